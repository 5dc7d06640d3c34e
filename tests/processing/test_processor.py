"""`Processor`: the door every prompt enters by. Behind it, nothing is checked again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.checkpoint.config_file import parse_config
from wemm.errors import MediaError, PromptError, PromptTooLongError
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import IMAGE_TOKEN_ID, Processor, image_reader
from wemm.processing.tokenizer import IM_END, IM_START, Tokenizer

TINY = BUNDLED_DIRECTORY / "tiny"
TOKENIZER = Tokenizer(TINY)
CONFIG = parse_config(json.loads((TINY / "config.json").read_text(encoding="utf-8")))
START, END = TOKENIZER.control_ids[IM_START], TOKENIZER.control_ids[IM_END]

GOLDEN_DIRECTORY = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_DIRECTORY / "golden.json").read_text(encoding="utf-8"))
IMAGE_CASES = [case for case in GOLDEN["cases"] if case["image"]]
TEXT_CASES = [case for case in GOLDEN["cases"] if case.get("prompt_token_ids")]

NASTY = ["<image>", "[UNUSED_TOKEN_145]", "<|im_end|>", "<|im_start|>assistant\n", "</s>", "<s>", "<unk>", "▁"]


def make_processor(max_prompt_len=32768, reference_image_mode=False):
    read_image = image_reader(ImageProcessor(CONFIG), reference_image_mode)
    return Processor(TOKENIZER, read_image, max_prompt_len, CONFIG.text.vocab_size)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def golden_image(name):
    return GOLDEN_DIRECTORY / "images" / name


def ask(words, *images):
    """A user's message: the images, then the words."""
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def user_turn(token_ids):
    """The ids the user's own words became: between `user NL` and the end of the turn."""
    header = [TOKENIZER.bos_id, START]
    tail = [END, START, *TOKENIZER.encode("assistant\n")]
    assert list(token_ids[:2]) == header
    assert list(token_ids[-len(tail) :]) == tail
    return list(token_ids[2 : -len(tail)])


# --- the reference's prompts -------------------------------------------------------------------------


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case["text"])
def test_the_ids_of_a_text_prompt_match_the_reference(processor, case):
    prompt = processor.chat([{"role": "user", "content": case["text"]}])
    assert list(prompt.token_ids) == case["prompt_token_ids"]
    assert len(prompt.token_ids) == case["prompt_len"]
    assert prompt.image_spans == ()
    assert prompt.num_image_tokens == 0


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case["image"])
def test_the_length_of_an_image_prompt_matches_the_reference(processor, case):
    prompt = processor.chat([ask(case["text"], golden_image(case["image"]))])
    assert len(prompt.token_ids) == case["prompt_len"]
    assert prompt.num_image_tokens == case["num_image_tokens"]


@pytest.mark.parametrize("case", IMAGE_CASES[:2], ids=lambda case: case["image"])
def test_an_image_prompt_is_bos_header_image_text_and_the_assistants_header(processor, case):
    prompt = processor.chat([ask(case["text"], golden_image(case["image"]))])
    assert list(prompt.token_ids) == [
        TOKENIZER.bos_id,
        START,
        *TOKENIZER.encode("user\n"),
        *[IMAGE_TOKEN_ID] * case["num_image_tokens"],
        *TOKENIZER.encode("\n" + case["text"]),
        END,
        START,
        *TOKENIZER.encode("assistant\n"),
    ]


# --- images ------------------------------------------------------------------------------------------


def test_image_spans_are_exactly_the_image_positions_in_order(processor):
    """Three images of different sizes over two turns."""
    images = [Image.new("RGB", size) for size in ((40, 10), (10, 10), (10, 25))]
    messages = [ask("One?", *images[:2]), {"role": "assistant", "content": "Two."}, ask("And now?", images[2])]
    prompt = processor.chat(messages)
    plans = [ImageProcessor(CONFIG).plan(*image.size) for image in images]
    assert [span.image.plan for span in prompt.image_spans] == plans
    assert [span.stop - span.start for span in prompt.image_spans] == [plan.num_tokens for plan in plans]
    covered = [position for span in prompt.image_spans for position in range(span.start, span.stop)]
    assert covered == [i for i, token_id in enumerate(prompt.token_ids) if token_id == IMAGE_TOKEN_ID]
    assert len(set(covered)) == prompt.num_image_tokens == sum(plan.num_tokens for plan in plans)


def test_neighbouring_images_are_parted_by_a_newline(processor):
    prompt = processor.chat([ask("Same?", Image.new("RGB", (9, 9)), Image.new("RGB", (9, 9)))])
    first, second = prompt.image_spans
    assert list(prompt.token_ids[first.stop : second.start]) == TOKENIZER.encode("\n")
    assert first.image.sha256 == second.image.sha256


def test_a_golden_image_is_the_same_by_path_bytes_and_pil_image(processor):
    path = golden_image("33x21.png")
    with Image.open(path) as image:
        prompts = [processor.chat([ask("?", source)]) for source in (path, str(path), path.read_bytes(), image)]
    assert len({prompt.image_spans[0].image.sha256 for prompt in prompts}) == 1
    assert len({prompt.token_ids for prompt in prompts}) == 1


def test_reference_image_mode_reaches_the_image():
    """A transparent black picture: white for people, black for the original."""
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    for mode, sample in ((False, 255), (True, 0)):
        (span,) = make_processor(reference_image_mode=mode).chat([ask("?", transparent)]).image_spans
        assert (span.image.pixels == sample).all()


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([ask("?", b"not an image")], "messages[0].content[0].image"),
        ([ask("?", Image.new("RGB", (1, 1)), "/no/such/file.png")], "messages[0].content[1].image"),
        ([{"role": "system", "content": "Hi"}, ask("?", 5)], "messages[1].content[0].image"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}],
            "messages[0].content[0].image_url",
        ),
    ],
)
def test_a_bad_image_is_named_by_its_place_in_the_messages(processor, messages, param):
    with pytest.raises(MediaError, match="^" + re.escape(param) + ": .") as caught:
        processor.chat(messages)
    assert "\n" not in str(caught.value)


# --- user text is only text --------------------------------------------------------------------------


def test_a_literal_image_placeholder_and_a_spelled_stop_token_stay_text(processor):
    (case,) = [case for case in GOLDEN["cases"] if "note" in case]
    turn = user_turn(processor.chat([{"role": "user", "content": case["text"]}]).token_ids)
    assert TOKENIZER.decode(turn) == "user\n" + case["text"]
    assert not set(turn) & set(GOLDEN["control_token_ids"].values())
    assert IMAGE_TOKEN_ID not in turn


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=5)), max_size=6).map("".join))
def test_no_text_of_the_user_yields_a_control_id_or_an_image_position(words):
    turn = user_turn(make_processor().chat([{"role": "user", "content": words}]).token_ids)
    assert TOKENIZER.decode(turn) == "user\n" + words
    assert not TOKENIZER.special_ids.intersection(turn)
    assert IMAGE_TOKEN_ID not in turn


def test_words_beside_an_image_open_no_second_image(processor):
    prompt = processor.chat([ask("<image><image>", Image.new("RGB", (9, 9)))])
    assert len(prompt.image_spans) == 1


# --- raw text ----------------------------------------------------------------------------------------


def test_raw_text_is_bos_and_the_text(processor):
    assert list(processor.text("Hello <|im_end|>").token_ids) == [
        TOKENIZER.bos_id,
        *TOKENIZER.encode("Hello <|im_end|>"),
    ]
    assert processor.text("").token_ids == (TOKENIZER.bos_id,)


@pytest.mark.parametrize("prompt", [None, 5, b"Hello", ["Hello"]])
def test_raw_text_of_another_type_is_refused(processor, prompt):
    with pytest.raises(PromptError, match=type(prompt).__name__):
        processor.text(prompt)


@pytest.mark.parametrize("surrogate", ["\ud800", "half \udc00"])
def test_a_lone_surrogate_is_refused_everywhere(processor, surrogate):
    with pytest.raises(PromptError, match="not valid Unicode"):
        processor.text(surrogate)
    with pytest.raises(PromptError, match="not valid Unicode"):
        processor.chat([{"role": "user", "content": surrogate}])


# --- token ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_ids", [[0], [5, 639], (1, 2, 3), range(10)])
def test_token_ids_are_taken_as_they_are(processor, token_ids):
    prompt = processor.token_ids(token_ids)
    assert prompt.token_ids == tuple(token_ids)
    assert prompt.image_spans == ()


@pytest.mark.parametrize("token_id", [-1, IMAGE_TOKEN_ID, 640, 2**70, True, 1.0, float("nan"), "1", None, [1]])
def test_a_token_id_outside_the_vocabulary_is_refused_by_its_value(processor, token_id):
    with pytest.raises(PromptError, match=re.escape(f"[0, 640). Given: {token_id!r}")):
        processor.token_ids([1, token_id])


@pytest.mark.parametrize("token_ids", [[], ()])
def test_no_token_ids_are_refused(processor, token_ids):
    with pytest.raises(PromptError, match="empty: give at least one token id"):
        processor.token_ids(token_ids)


@pytest.mark.parametrize("prompt", [None, 5, 1.5, object()])
def test_a_prompt_that_is_no_list_of_ids_is_refused(processor, prompt):
    """`LLM.generate([None])` ends up here."""
    with pytest.raises(PromptError):
        processor.token_ids(prompt)


# --- length ------------------------------------------------------------------------------------------


def enter(kind, processor, length):
    """A prompt of exactly `length` tokens through one of the three doors."""
    if kind == "token_ids":
        return processor.token_ids([5] * length)
    if kind == "text":
        return processor.text("\n" * (length - 1))
    frame = len(processor_frame())
    return processor.chat([{"role": "user", "content": "\n" * (length - frame)}])


def processor_frame():
    """BOS and the headers: what the template adds to the user's words."""
    return make_processor().chat([{"role": "user", "content": ""}]).token_ids


@pytest.mark.parametrize("kind", ["token_ids", "text", "chat"])
def test_a_prompt_that_just_fits_enters_and_one_token_more_is_refused_with_both_counts(kind):
    processor = make_processor(max_prompt_len=40)
    assert len(enter(kind, processor, 40).token_ids) == 40
    with pytest.raises(PromptTooLongError, match=r"41 tokens.* 40; shorten it or raise --max-model-len"):
        enter(kind, processor, 41)


def test_image_positions_count():
    case = IMAGE_CASES[0]
    message = ask(case["text"], golden_image(case["image"]))
    assert make_processor(max_prompt_len=case["prompt_len"]).chat([message])
    with pytest.raises(PromptTooLongError, match=rf"{case['prompt_len']} tokens.* {case['prompt_len'] - 1};"):
        make_processor(max_prompt_len=case["prompt_len"] - 1).chat([message])


def test_a_hundred_thousand_emoji_are_too_long_not_too_much(processor):
    with pytest.raises(PromptTooLongError, match=r"4000\d\d tokens"):
        processor.chat([{"role": "user", "content": "😀" * 100_000}])
