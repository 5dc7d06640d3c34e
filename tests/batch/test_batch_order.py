"""Questions about one picture are asked together, whatever its file is called."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from wemm.batch.order import image_order, same_files
from wemm.batch.question import Question, user_turn
from wemm.request import SamplingParams


def _questions(*images):
    return [Question(user_turn("?", [image] if image else []), SamplingParams()) for image in images]


def test_equal_files_are_neighbours_in_the_order_of_their_first(tmp_path):
    for name, data in (("a", b"one"), ("b", b"two"), ("copy of a", b"one"), ("longer", b"four")):
        (tmp_path / name).write_bytes(data)
    a, b, copy, longer = (tmp_path / name for name in ("a", "b", "copy of a", "longer"))
    assert image_order(_questions(a, b, longer, copy, b, a)) == [0, 3, 5, 1, 4, 2]


@given(st.lists(st.sampled_from(["x", "y", "z", ""]), max_size=12))
def test_every_question_is_asked_once_and_equal_pictures_never_part(images):
    questions = _questions(*images)
    order = image_order(questions)
    assert sorted(order) == list(range(len(images)))
    shown = [images[place] for place in order if images[place]]
    runs = [image for i, image in enumerate(shown) if i == 0 or shown[i - 1] != image]
    assert len(runs) == len(set(runs))
    text_only = [place for place in order if not images[place]]
    assert text_only == sorted(text_only)


def test_only_files_of_equal_size_are_read(tmp_path):
    alone, unreadable = tmp_path / "alone", tmp_path / "absent"
    os.mkfifo(alone)  # to read it would block for ever
    names = same_files([str(alone), str(unreadable)])
    assert names == {str(alone): str(alone), str(unreadable): str(unreadable)}
