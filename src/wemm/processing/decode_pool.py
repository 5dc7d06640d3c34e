"""Decodes and resizes the images of strangers in other processes, which are confined and replaced when they die.

What comes back from such a process is a stranger's too: a small JSON object and as many raw pixels as the plan
asks for, nothing else. The hash is computed here, for a process that was taken over could otherwise name the hash
of somebody else's image.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch

from wemm.config import ModelConfig
from wemm.errors import EngineError, MediaError
from wemm.processing.decode_worker import OUT_OF_MEMORY, read_header, write_message
from wemm.processing.image_processor import ProcessedImage
from wemm.processing.media import MAX_IMAGE_BYTES
from wemm.processing.resize import hash_pixels, image_config_for, plan_image

logger = logging.getLogger(__name__)

_START_SECONDS = 120
_EXIT_SECONDS = 5
_INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
_MAX_PROBLEM_LEN = 500


@dataclass(frozen=True)
class DecodedImage:
    """An image for the model, and what it was."""

    image: ProcessedImage
    original_size: tuple[int, int]
    """(width, height), upright."""
    decode_seconds: float
    preprocess_seconds: float


class DecodePool:
    """At most `num_workers` processes, each with one image at a time. They start when first needed."""

    def __init__(
        self,
        config: ModelConfig,
        num_workers: int,
        *,
        reference_image_mode: bool = False,
        max_image_pixels: int = 50_000_000,
        timeout: float = 20.0,
        memory: int = 2 * 2**30,
    ) -> None:
        """`timeout`: seconds for one image. `memory`: bytes that a worker may map beyond what it starts with."""
        self._config = config
        self._reference_image_mode = reference_image_mode
        self._max_image_pixels = max_image_pixels
        self._timeout = timeout
        self._memory = memory
        self._slots = threading.BoundedSemaphore(num_workers)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._refused: list[str] = []
        self._closed = False
        # A worker dies with the thread that started it: that must not be a caller's.
        self._starter = ThreadPoolExecutor(1, "decode-pool")

    def process(self, data: bytes, detail: str = "auto") -> DecodedImage:
        """Decode and resize the bytes of an image file. Blocks; from any thread.

        Raises PromptError for an unknown `detail`, MediaError for the image, also where it killed its worker by
        time, by memory or otherwise (the next image gets a new one), EngineError where no worker can be started.
        """
        rule = image_config_for(detail, self._config)
        if len(data) > MAX_IMAGE_BYTES:
            raise MediaError(f"image has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read")
        request = {
            "edges": [rule.shortest_edge, rule.longest_edge, rule.fixed_size],
            "reference_image_mode": self._reference_image_mode,
            "max_image_pixels": self._max_image_pixels,
        }
        with self._slots:
            worker = self._take()
            try:
                worker.start(self._memory, self._timeout)
                self._warn(worker.refused)
                return self._ask(worker, request, data, detail)
            except EngineError:
                self._check_open()
                raise
            finally:
                self._give_back(worker)

    def close(self) -> None:
        """End all workers; an image that is being decoded fails with EngineError."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()
        for worker in idle:
            worker.close()
        self._starter.shutdown()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> _Worker:
        with self._lock:
            self._check_open()
            worker = None
            while worker is None and self._idle:
                worker = self._idle.pop()
                if not worker.is_alive():
                    worker.close()
                    worker = None
            worker = worker or self._start()
            self._busy.add(worker)
            return worker

    def _start(self) -> _Worker:
        try:
            return self._starter.submit(_Worker).result()
        except OSError as error:
            raise EngineError(f"the process that decodes images cannot be started: {error.strerror}") from None

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.is_alive() and not self._closed:
                self._idle.append(worker)
                return
        worker.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this DecodePool is closed")

    def _warn(self, refused: list[str]) -> None:
        if refused != self._refused:
            self._refused = refused
            logger.warning("this system does not confine the decoding of images by %s", ", ".join(refused))

    def _ask(self, worker: _Worker, request: dict[str, Any], data: bytes, detail: str) -> DecodedImage:
        try:
            with worker.deadline(self._timeout):
                header, num_bytes = worker.ask(request, data)
                if "problem" in header:
                    raise MediaError(_one_line(header["problem"]))
                width, height, *seconds = _checked(header, self._max_image_pixels)
                plan = plan_image(width, height, self._config, detail)
                pixels = np.empty((plan.resized[1], plan.resized[0], 3), np.uint8)
                worker.read_into(pixels, num_bytes)
        except MediaError:
            raise
        except (EOFError, OSError):
            status = worker.end()
            self._check_open()
            raise self._failure(worker, status) from None
        except ValueError:
            raise self._failure(worker, worker.kill()) from None
        except BaseException:
            worker.kill()  # half an answer may be in its pipe
            raise
        image = ProcessedImage(torch.from_numpy(pixels), plan, hash_pixels(pixels))
        return DecodedImage(image, (width, height), *seconds)

    def _failure(self, worker: _Worker, status: int) -> MediaError:
        if worker.expired or status == -signal.SIGXCPU:
            return MediaError(f"the image took longer than {self._timeout:g} s to decode")
        if status == OUT_OF_MEMORY:
            return MediaError(f"the image took more than {self._memory // 2**20} MiB to decode")
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return MediaError(f"the image could not be decoded: its decoder ended with {how}")


class _Worker:
    """One process, from the side of its parent."""

    def __init__(self) -> None:
        self.expired = False
        self.refused: list[str] = []
        self._started = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wemm.processing.decode_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # an interrupt from the terminal is for the parent
        )
        self._requests = cast(io.BufferedWriter, self._process.stdin)
        self._answers = cast(io.BufferedReader, self._process.stdout)

    def start(self, memory: int, timeout: float) -> None:
        """Wait until a new process is confined. Raises EngineError."""
        if self._started:
            return
        limits = {"memory": memory, "cpu_seconds": math.ceil(timeout) + 1}
        try:
            with self.deadline(_START_SECONDS):
                header, _ = self.ask(limits, b"")
        except (EOFError, OSError, ValueError):
            raise EngineError(f"the process that decodes images does not start: status {self.end()}") from None
        self._started, self.refused = True, header["refused"]

    def ask(self, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], int]:
        """Send a message, return the header of the answer. Raises EOFError, OSError, ValueError."""
        write_message(self._requests, header, data)
        answer = read_header(self._answers)
        if answer is None:
            raise EOFError
        return answer

    def read_into(self, pixels: np.ndarray, num_bytes: int) -> None:
        """The bytes that follow the header: as many as the array has, or ValueError. Raises EOFError."""
        if num_bytes != pixels.nbytes:
            raise ValueError(f"{num_bytes} bytes")
        if self._answers.readinto(pixels.data.cast("B")) != num_bytes:
            raise EOFError

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Kill the process if the block takes longer; `expired` says so."""
        timer = threading.Timer(seconds, self._expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        self.expired = True
        self._process.kill()

    def is_alive(self) -> bool:
        """Whether it can take another image."""
        return not self.expired and self._process.poll() is None

    def kill(self) -> int:
        """End it at once. Its exit status, negative for a signal."""
        self._process.kill()
        return self._process.wait()

    def end(self) -> int:
        """Let it end by itself if it will. Its exit status, negative for a signal."""
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return self.kill()

    def close(self) -> None:
        """End it, or gather what a dead one left."""
        with contextlib.suppress(OSError):  # what was not sent goes nowhere
            self._requests.close()
        self.end()
        self._answers.close()


def _environment() -> dict[str, str]:
    """The same modules as here, and no secret of the service."""
    return {
        **{name: os.environ[name] for name in _INHERITED if name in os.environ},
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _checked(header: dict[str, Any], max_image_pixels: int) -> tuple[int, int, float, float]:
    """Width, height and two durations, if they can be. Raises ValueError."""
    match header:
        case {"original_size": [int(width), int(height)], "seconds": [float(decode), float(preprocess)]}:
            possible = width > 0 and height > 0 and width * height <= max_image_pixels
            if possible and math.isfinite(decode + preprocess) and min(decode, preprocess) >= 0:
                return width, height, decode, preprocess
    raise ValueError("an answer that cannot be")


def _one_line(problem: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(problem)[:_MAX_PROBLEM_LEN])
