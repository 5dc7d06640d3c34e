"""How much is accepted at once: counted before anything is read, given back however a request ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from wemm.errors import WemmError


class OverloadedError(WemmError):
    """There is no room now; the same request may be welcome later."""

    def __init__(self, message: str, retry_after: int) -> None:
        """`retry_after`: seconds after which it is worth another try."""
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Admission:
    """Counts of what is accepted and not yet answered."""

    max_requests: int
    max_bytes: int
    num_requests: int = 0
    num_bytes: int = 0

    @contextmanager
    def admit(self, num_bytes: int, retry_after: int) -> Iterator[None]:
        """Hold room for one request whose body has so many bytes. Raises OverloadedError."""
        if self.num_requests >= self.max_requests:
            raise OverloadedError(
                f"{self.num_requests} requests are waiting or running, as many as --max-queued-requests allows; "
                f"try again in {retry_after} s",
                retry_after,
            )
        if self.num_requests and self.num_bytes + num_bytes > self.max_bytes:
            raise OverloadedError(
                f"requests of {self.num_bytes} bytes are under way and this one has {num_bytes}; together more "
                f"than the {self.max_bytes} of --max-queued-bytes; try again in {retry_after} s",
                retry_after,
            )
        self.num_requests += 1
        self.num_bytes += num_bytes
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_bytes -= num_bytes
