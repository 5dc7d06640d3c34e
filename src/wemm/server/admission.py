"""How much is accepted at once: counted before it takes memory, given back however a request ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wemm.errors import WemmError

Hold = Callable[[int], None]
"""Holds so many bytes more until the request ends. Raises OverloadedError."""


class OverloadedError(WemmError):
    """There is no room now; the same request may be welcome later."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        """`retry_after`: seconds after which it is worth another try."""
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Admission:
    """What is accepted and not yet answered: requests, and the bytes of their bodies and pixels."""

    max_requests: int
    max_bytes: int
    num_requests: int = 0
    num_bytes: int = 0

    @contextmanager
    def admit(self, retry_after: int) -> Iterator[None]:
        """A place for one request. Raises OverloadedError."""
        if self.num_requests >= self.max_requests:
            raise OverloadedError(
                f"{self.num_requests} requests are waiting or running, as many as --max-queued-requests allows; "
                f"try again in {retry_after} s",
                retry_after,
            )
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Room for the bytes of one request, which are told as they come. Alone, a request may be any size."""
        held = 0

        def add(num_bytes: int) -> None:
            nonlocal held
            others = self.num_bytes - held
            if others and self.num_bytes + num_bytes > self.max_bytes:
                raise OverloadedError(
                    f"requests of {others} bytes are under way, images counted as pixels, and this one has "
                    f"{held + num_bytes}: more than the {self.max_bytes} of --max-queued-bytes; try again soon"
                )
            held += num_bytes
            self.num_bytes += num_bytes

        try:
            yield add
        finally:
            self.num_bytes -= held
