"""Any OpenAI-compatible service can answer: what fails for one question stays there."""

from __future__ import annotations

import base64
import itertools
import threading
from pathlib import Path

import pytest

pytest.importorskip("openai")

from tests.batch.scripted_service import completion, refusal, scripted_service
from wemm.batch.endpoint_client import EndpointClient
from wemm.batch.question import Question, user_turn
from wemm.errors import EndpointError
from wemm.request import SamplingParams

WORD = Path(__file__).parents[2] / "docs/images/word.png"


@pytest.fixture
def service():
    with scripted_service() as service:
        yield service


@pytest.fixture
def client(service):
    with EndpointClient(service.url, timeout=5) as client:
        yield client


def _question(text="?", images=(), **sampling):
    return Question(user_turn(text, images), SamplingParams(**sampling))


def _ask(client, *questions):
    answers = dict(client.answers(questions))
    return [answers[place] for place in range(len(questions))]


def test_an_answer_with_its_counts(service, client):
    service.reply = lambda body: completion(
        "WEMM",
        prompt_tokens=26,
        completion_tokens=4,
        prompt_tokens_details={"cached_tokens": 3, "image_tokens": 10},
    )
    [answer] = _ask(client, _question())
    assert (answer.text, answer.finish_reason, answer.error) == ("WEMM", "stop", None)
    assert (answer.prompt_tokens, answer.completion_tokens) == (26, 4)
    assert (answer.image_tokens, answer.cached_tokens) == (10, 3)
    assert answer.seconds > 0


def test_a_service_that_counts_nothing_is_fine(service, client):
    assert _ask(client, _question())[0].prompt_tokens == 0


def test_images_travel_as_they_are(service, client):
    _ask(client, _question("what?", [WORD]))
    [body] = service.bodies
    image, text = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "what?"}
    assert base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,")) == WORD.read_bytes()


def test_only_what_differs_from_the_standard_leaves_the_standard(service, client):
    _ask(client, _question(), _question(top_k=3, stop=["x"], ignore_eos=True, seed=5))
    plain, special = sorted(service.bodies, key=len)
    assert set(plain) - {"messages"} == {
        "model", "max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty"
    }  # fmt: skip
    assert (special["top_k"], special["stop"], special["ignore_eos"], special["seed"]) == (3, ["x"], True, 5)


def test_the_first_model_unless_one_is_named(service, client):
    assert client.model == "first"
    with EndpointClient(service.url, "second") as named:
        _ask(named, _question())
    assert service.bodies[-1]["model"] == "second"


def test_the_key_is_sent(service):
    with EndpointClient(service.url, api_key="sk-1") as client:
        _ask(client, _question())
    assert service.keys == {"Bearer sk-1"}


def test_many_at_once_but_never_more_than_allowed(service):
    """Six may be under way: the sixth is waited for by the first five, a seventh would be seen."""
    barrier = threading.Barrier(6)

    def reply(body):
        barrier.wait(20)
        return completion(body["messages"][0]["content"][0]["text"])

    service.reply = reply
    with EndpointClient(service.url, concurrency=6) as client:
        answers = _ask(client, *(_question(f"q{i}") for i in range(18)))
    assert [answer.text for answer in answers] == [f"q{i}" for i in range(18)]
    assert service.most_at_once == 6


def test_questions_are_taken_as_they_are_needed(service):
    taken = itertools.count()

    def endless():
        while True:
            next(taken)
            yield _question()

    with EndpointClient(service.url, concurrency=2) as client:
        answers = client.answers(endless())
        for _ in range(5):
            next(answers)
        answers.close()
    assert next(taken) <= 8


def test_a_refused_question_harms_no_other(service, client):
    def reply(body):
        return (
            refusal(400, "too long") if body["messages"][0]["content"][0]["text"] == "bad" else completion("fine")
        )

    service.reply = reply
    good, bad, last = _ask(client, _question(), _question("bad"), _question())
    assert (good.text, last.text) == ("fine", "fine")
    assert (bad.error_type, bad.text) == ("400", "")
    assert "too long" in bad.error


def test_an_unreadable_picture_harms_no_other(service, client, tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    broken, fine = _ask(client, _question(images=[tmp_path / "x.png"]), _question(images=[WORD]))
    assert broken.error_type == "MediaError"
    assert fine.text == "hello"
    assert len(service.bodies) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_waited_for_as_long_as_it_asks(service, client, status):
    replies = iter(
        [refusal(status, retry_after="0.01"), refusal(status, retry_after="0.01"), completion("at last")]
    )
    service.reply = lambda body: next(replies)
    assert _ask(client, _question())[0].text == "at last"
    assert len(service.bodies) == 3


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "give --api-key"), (403, "key that may"), (404, "GET /v1/models")]
)
def test_what_would_fail_for_all_is_raised(service, client, status, remedy):
    service.reply = lambda body: refusal(status)
    with pytest.raises(EndpointError, match=remedy):
        _ask(client, _question())


def test_a_service_that_is_not_there_is_said_at_once():
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1 cannot be reached.*is the service running"):
        EndpointClient("http://127.0.0.1:9/v1", "m")


def test_a_service_without_models_needs_a_name(service):
    service.models = []
    with pytest.raises(EndpointError, match="name one by --model"):
        EndpointClient(service.url)


def test_an_answer_without_a_choice_is_an_error_of_its_question(service, client):
    status, body, headers = completion("x")
    service.reply = lambda _: (status, {**body, "choices": []}, headers)
    assert _ask(client, _question())[0].error_type == "empty"


def test_a_slow_answer_is_an_error_of_its_question(service):
    hold = threading.Event()
    service.reply = lambda body: hold.wait(20) and completion("late")
    with EndpointClient(service.url, timeout=0.2) as client:
        client._client.max_retries = 0
        [answer] = _ask(client, _question())
    hold.set()
    assert answer.error_type == "timeout"
