"""In which order to ask: questions about one picture together, so that it is encoded once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from wemm.batch.question import Question


def image_order(questions: Sequence[Question]) -> list[int]:
    """Places of the questions, those with the same images side by side, where the first of them stood."""
    identities = same_files(path for question in questions for path in question.image_paths)
    first: dict[tuple[str, ...], int] = {}
    order = []
    for place, question in enumerate(questions):
        shown = tuple(identities[path] for path in question.image_paths)
        # Without a picture there is nothing to share.
        order.append((first.setdefault(shown, place) if shown else place, place))
    return [place for _, place in sorted(order)]


def same_files(paths: Iterable[str]) -> dict[str, str]:
    """Path → a name that files of equal content share. Only files of equal size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        names[path] = path
        try:
            by_size[Path(path).stat().st_size].append(path)
        except (OSError, ValueError):
            continue  # its own error comes when it is asked about
    for alike in by_size.values():
        if len(alike) > 1:
            names.update({path: _digest(path) for path in alike})
    return names


def _digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(2**20):
                digest.update(chunk)
            return digest.hexdigest()
    except OSError:
        return path
