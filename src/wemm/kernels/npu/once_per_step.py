"""What every layer of a step would derive anew from the same tensors: derived by the first of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

R = TypeVar("R")

_MOST_KEPT = 4
"""Every layer asks for lengths of decodes, lengths and bounds of chunks, in turn."""


class OncePerStep(Generic[R]):
    """A function of tensors that nobody writes to while a step lasts; its last results are kept."""

    def __init__(self, function: Callable[..., R]) -> None:
        self._function = function
        # With their tensors: memory that is still held is not given to others, so an address says which it is.
        self._kept: deque[tuple[Any, tuple[torch.Tensor, ...], R]] = deque(maxlen=_MOST_KEPT)
        _ALL.append(self)

    def __call__(self, *tensors: torch.Tensor) -> R:
        """The kept result for these very tensors, or a new one."""
        given = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        for known, _, result in tuple(self._kept):
            if known == given:
                return result
        result = self._function(*tensors)
        self._kept.append((given, tensors, result))
        return result

    def forget(self) -> None:
        """Let go of tensors and results."""
        self._kept.clear()


_ALL: list[OncePerStep[Any]] = []


def forget() -> None:
    """Let go of everything that is kept."""
    for function in _ALL:
        function.forget()


as_list: OncePerStep[list[int]] = OncePerStep(torch.Tensor.tolist)
"""Lengths and bounds, which the fused attention takes from the host: this waits for the device."""
