"""The chat template: the original's letters for [image, text], and the same rules for the rest."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.errors import PromptError
from wemm.processing.chat_template import Control, ImagePart, Text, render

START, END = Control("<|im_start|>"), Control("<|im_end|>")
ASK = [START, Text("assistant\n")]


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


def image_url(url):
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts):
    return {"role": "user", "content": list(parts)}


# --- what is rendered --------------------------------------------------------------------------------


def test_image_and_text_render_as_in_the_original():
    """<|im_start|>user NL IMAGE NL TEXT <|im_end|><|im_start|>assistant NL, no newline in between."""
    assert render([user(image("a.png"), text("What is written here?"))]) == [
        START,
        Text("user\n"),
        ImagePart("a.png", "messages[0].content[0].image"),
        Text("\nWhat is written here?"),
        END,
        START,
        Text("assistant\n"),
    ]


@pytest.mark.parametrize("content", ["Why?", [{"type": "text", "text": "Why?"}]])
def test_text_only_has_no_newline_after_im_end(content):
    """The role and the text are one stretch for the tokenizer, as in the original."""
    assert render([{"role": "user", "content": content}]) == [START, Text("user\nWhy?"), END, *ASK]


def test_parts_of_a_message_are_joined_by_a_newline_in_their_order():
    assert render([user(text("Compare"), image("a.png"), image("b.png"), text("with"), text("care"))]) == [
        START,
        Text("user\nCompare\n"),
        ImagePart("a.png", "messages[0].content[1].image"),
        Text("\n"),
        ImagePart("b.png", "messages[0].content[2].image"),
        Text("\nwith\ncare"),
        END,
        *ASK,
    ]


def test_turns_keep_their_order_and_their_images():
    messages = [
        user(image("a.png"), text("First?")),
        {"role": "assistant", "content": "One."},
        user(text("Second?"), image("b.png")),
    ]
    assert render(messages) == [
        START,
        Text("user\n"),
        ImagePart("a.png", "messages[0].content[0].image"),
        Text("\nFirst?"),
        END,
        START,
        Text("assistant\nOne."),
        END,
        START,
        Text("user\nSecond?\n"),
        ImagePart("b.png", "messages[2].content[1].image"),
        END,
        *ASK,
    ]


def test_a_system_message_is_a_turn_of_its_own():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert render(messages) == [START, Text("system\nBe brief."), END, START, Text("user\nWhy?"), END, *ASK]


def test_no_system_message_is_invented():
    assert Text("system\n") not in render([user(text("Why?"))])


def test_an_image_alone_is_a_message():
    assert render([user(image("a.png"))]) == [
        START,
        Text("user\n"),
        ImagePart("a.png", "messages[0].content[0].image"),
        END,
        *ASK,
    ]


@pytest.mark.parametrize("content", ["", [{"type": "text", "text": ""}]])
def test_an_empty_text_is_a_message(content):
    assert render([{"role": "user", "content": content}]) == [START, Text("user\n"), END, *ASK]


def test_an_image_url_is_an_image_named_by_its_own_key():
    (part,) = [part for part in render([user(image_url("data:x"))]) if isinstance(part, ImagePart)]
    assert part == ImagePart("data:x", "messages[0].content[0].image_url")


def test_an_image_url_may_be_a_plain_string():
    assert render([user({"type": "image_url", "image_url": "data:x"})]) == render([user(image_url("data:x"))])


def test_an_image_source_is_passed_on_untouched():
    source = object()
    assert render([user(image(source))])[2].source is source


def test_tuples_will_do_for_lists():
    parts = [image("a.png"), text("Why?")]
    assert render(({"role": "user", "content": tuple(parts)},)) == render([user(*parts)])


def test_unknown_keys_of_a_message_are_ignored():
    """Clients send names, ids and detail levels."""
    sent = {"role": "user", "name": "me", "content": [{"type": "text", "text": "Why?", "cache": True}]}
    assert render([sent]) == render([{"role": "user", "content": "Why?"}])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.text(), st.sampled_from(["<|im_end|>", "<|im_start|>", "<image>", "[UNUSED_TOKEN_145]"]))
    )
)
def test_no_user_text_changes_the_structure(texts):
    """Whatever is said, the control tokens are those of the turns, and the words arrive unchanged."""
    said = "\n".join(texts)
    rendered = render([{"role": "user", "content": [text(words) for words in [*texts, "end"]]}])
    assert rendered == [START, Text("user\n" + "".join(words + "\n" for words in texts) + "end"), END, *ASK]
    assert said in rendered[1].text


# --- what is refused ---------------------------------------------------------------------------------

GOOD = user(text("Why?"))


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        pytest.param(None, "messages must be a non-empty list", id="nothing"),
        pytest.param([], "messages must be a non-empty list", id="no messages"),
        pytest.param("Why?", "messages must be a non-empty list", id="text"),
        pytest.param({"role": "user", "content": "Why?"}, "messages must be a non-empty list", id="one message"),
        pytest.param(5, "messages must be a non-empty list", id="number"),
        pytest.param(
            ["Why?"], "messages[0] must be an object with role and content. Given: str", id="str message"
        ),
        pytest.param([GOOD, None], "messages[1] must be an object", id="null message"),
        pytest.param([{}], "messages[0].role must be one of system, user, assistant. Given: None", id="no role"),
        pytest.param([{"role": "tool", "content": ""}], "messages[0].role", id="unknown role"),
        pytest.param([{"role": "User", "content": ""}], "Given: 'User'", id="capital role"),
        pytest.param([{"role": ["user"], "content": ""}], "messages[0].role", id="role is a list"),
        pytest.param([{"role": 1, "content": ""}], "messages[0].role", id="role is a number"),
        pytest.param([{"role": "user"}], "messages[0].content", id="no content"),
        pytest.param([{"role": "user", "content": None}], "messages[0].content", id="null content"),
        pytest.param([{"role": "user", "content": []}], "messages[0].content", id="no parts"),
        pytest.param([{"role": "user", "content": 5}], "messages[0].content", id="content is a number"),
        pytest.param(
            [{"role": "user", "content": b"Why?"}], "messages[0].content must be a string", id="content is bytes"
        ),
        pytest.param([{"role": "user", "content": text("Why?")}], "messages[0].content", id="content is one part"),
        pytest.param([GOOD, {"role": "user", "content": []}], "messages[1].content", id="second message"),
        pytest.param([user(text("a"), "b")], "messages[0].content[1] must be", id="part is a str"),
        pytest.param([user(text("a"), None)], "messages[0].content[1] must be", id="part is null"),
        pytest.param([user({"text": "a"})], "messages[0].content[0] must be", id="part without type"),
        pytest.param([user({"type": "video", "video": "a"})], "messages[0].content[0] must be", id="video"),
        pytest.param(
            [user({"type": ["text"], "text": "a"})], "messages[0].content[0] must be", id="type is a list"
        ),
        pytest.param([user({"type": "text"})], "messages[0].content[0] must be", id="text without text"),
        pytest.param([user(text(None))], "messages[0].content[0] must be", id="text is null"),
        pytest.param([user(text(["a"]))], "messages[0].content[0] must be", id="text is a list"),
        pytest.param([user(image(None))], "messages[0].content[0] must be", id="image is null"),
        pytest.param([user({"type": "image"})], "messages[0].content[0] must be", id="image without image"),
        pytest.param(
            [user({"type": "image_url"})], "messages[0].content[0].image_url must hold a URL", id="no image_url"
        ),
        pytest.param(
            [user(image_url(None))], "messages[0].content[0].image_url must hold a URL", id="url is null"
        ),
        pytest.param(
            [user(image_url(5))], "messages[0].content[0].image_url must hold a URL", id="url is a number"
        ),
        pytest.param([user(image_url(""))], "messages[0].content[0].image_url must hold a URL", id="url is empty"),
        pytest.param(
            [user(image_url("a.png"))], "messages[0].content[0].image_url must hold a URL", id="url is a path"
        ),
        pytest.param(
            [{"role": "system", "content": [image("a.png")]}, GOOD],
            "messages[0]: only the user's messages may hold images",
            id="image in a system message",
        ),
        pytest.param(
            [GOOD, {"role": "assistant", "content": [text("a"), image_url("data:x")]}, GOOD],
            "messages[1]: only the user's messages may hold images",
            id="image in an assistant message",
        ),
        pytest.param([GOOD, {"role": "assistant", "content": "x"}], "Given: 'assistant'", id="assistant last"),
        pytest.param([{"role": "system", "content": "x"}], "last message must be the user's", id="system last"),
    ],
)
def test_a_malformed_message_is_refused_by_the_name_of_the_part(messages, named):
    with pytest.raises(PromptError, match=re.escape(named)) as caught:
        render(messages)
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "image_url", "url"]), inner),
    ),
    max_leaves=8,
)
ALMOST_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.one_of(st.just("user"), JSON), "content": st.one_of(st.lists(JSON), JSON)}),
    max_size=3,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(JSON, ALMOST_MESSAGES))
def test_any_messages_give_segments_or_a_prompt_error(messages):
    try:
        segments = render(messages)
    except PromptError as error:
        assert "\n" not in str(error)
        assert "message" in str(error)
    else:
        assert segments[-2:] == ASK
