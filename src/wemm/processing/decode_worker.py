"""The process that decodes the images of strangers: bytes in, resized pixels out, and no way to do anything else.

A decoder is a large piece of C that reads what anybody sent. Here it may fail, fill its memory, hang or be taken
over: the process can open no file and no socket, start nothing, write nothing but its answers, and its parent ends
it when it takes too long. decode_pool.py is the parent's side; nothing here imports torch.

What `confine` sets, and where it has an effect:

    memory          RLIMIT_AS, beyond what was mapped before     Linux
    open, socket    RLIMIT_NOFILE 0                              Linux, macOS
    writing files   RLIMIT_FSIZE 0                               Linux, macOS
    fork            RLIMIT_NPROC 0                               Linux, macOS; not for root
    core dumps      RLIMIT_CORE 0, PR_SET_DUMPABLE               Linux, macOS; Linux
    privileges      PR_SET_NO_NEW_PRIVS, no capabilities         Linux
    orphans         PR_SET_PDEATHSIG                             Linux; elsewhere it ends with its current image

It stays a process of the same user: it may send signals to others of that user, and system calls that need no file
are not filtered.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import math
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from PIL import Image

from wemm.config import ImageConfig
from wemm.errors import MediaError
from wemm.processing.media import FORMATS, open_image
from wemm.processing.resize import resize_image, resized_size

OUT_OF_MEMORY = 3
"""Exit status."""

_MESSAGE = struct.Struct(">IQ")
_MAX_HEADER_BYTES = 16384
_MAX_PROBLEM_LEN = 500

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522


def write_message(stream: IO[bytes], header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Lengths, a JSON object, raw bytes. Raises OSError where the other side has gone."""
    text = json.dumps(header).encode()
    stream.write(_MESSAGE.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def read_header(stream: IO[bytes]) -> tuple[dict[str, Any], int] | None:
    """The JSON object of a message and how many bytes follow it; None at the end. Raises ValueError."""
    start = stream.read(_MESSAGE.size)
    if len(start) < _MESSAGE.size:
        return None
    header_len, payload_len = _MESSAGE.unpack(start)
    if header_len > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {header_len} bytes")
    try:
        header = json.loads(stream.read(header_len))
    except RecursionError:
        raise ValueError("a header that is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, payload_len


def preload() -> None:
    """Import whatever decoding imports, which it often does at the first image of a kind."""
    Image.init()
    for name in ("ImagePalette", "MpoImagePlugin", "TiffImagePlugin"):
        importlib.import_module(f"PIL.{name}")
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in FORMATS:
        for mode, options in (("RGB", {}), ("P", {"transparency": 0})):
            file = io.BytesIO()
            # A Pillow without this format, a format without this mode: then no image will need it either.
            with contextlib.suppress(KeyError, OSError, MediaError):
                Image.new(mode, (2, 2)).save(file, format, exif=exif, **options)
                open_image(file.getvalue())


def confine(memory: int) -> tuple[str, ...]:
    """Give up for good all that decoding does not need; `memory` more bytes may be mapped.

    Returns the limits that this system refused. Files that are open stay so.
    """
    refused = []
    limits = {"RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_NOFILE": 0}
    mapped = _mapped_bytes()
    if mapped is None:
        refused.append("RLIMIT_AS")
    else:
        limits = {"RLIMIT_AS": mapped + memory, **limits}
    if sys.platform == "linux":
        refused += _give_up_privileges()
    for name, limit in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (limit, limit))
        except (AttributeError, ValueError, OSError):
            refused.append(name)
    return tuple(refused)


def _mapped_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return None
    return pages * resource.getpagesize()


def _give_up_privileges() -> list[str]:
    library = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    calls: dict[str, Callable[[], int]] = {
        "PR_SET_NO_NEW_PRIVS": lambda: library.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))),
        "PR_SET_DUMPABLE": lambda: library.prctl(_PR_SET_DUMPABLE, *map(ctypes.c_ulong, (0, 0, 0, 0))),
        "PR_SET_PDEATHSIG": lambda: library.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)),
        # A root that keeps its capabilities could raise its limits again.
        "capset": lambda: library.capset(header, (ctypes.c_uint32 * 6)()),
    }
    refused = []
    for name, call in calls.items():
        try:
            failed = call() != 0
        except AttributeError:  # a C library without it
            failed = True
        if failed:
            refused.append(name)
    return refused


def serve(requests: IO[bytes], answers: IO[bytes], cpu_seconds: int) -> None:
    """Answer until the requests end. The system ends this process after `cpu_seconds` of CPU time for one image.

    Raises MemoryError, after which the process should not go on.
    """
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while (message := read_header(requests)) is not None:
        header, num_bytes = message
        data = requests.read(num_bytes)
        allowed = math.ceil(time.process_time()) + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (allowed if most < 0 else min(allowed, most), most))
        try:
            answer, pixels = _process(data, **header)
        except MediaError as error:
            if isinstance(error.__context__, MemoryError) or "out of memory" in str(error):
                raise MemoryError from None
            write_message(answers, {"problem": str(error)[:_MAX_PROBLEM_LEN]})
        else:
            write_message(answers, answer, pixels)


def _process(
    data: bytes, edges: list[Any], reference_image_mode: bool, max_image_pixels: int
) -> tuple[dict[str, Any], memoryview]:
    shortest_edge, longest_edge, fixed_size = edges
    config = ImageConfig(shortest_edge, longest_edge, fixed_size and (fixed_size[0], fixed_size[1]))
    started = time.perf_counter()
    image = open_image(data, reference_image_mode, max_image_pixels)
    decoded = time.perf_counter()
    pixels = resize_image(image, resized_size(image.width, image.height, config))
    seconds = [decoded - started, time.perf_counter() - decoded]
    return {"original_size": image.size, "seconds": seconds}, pixels.data.cast("B")


def main() -> None:
    """Read the limits from standard input, give up everything else, then answer."""
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # a library that prints must not garble the answers
    limits = read_header(requests)
    if limits is None:
        return
    preload()
    os.dup2(nowhere, sys.stderr.fileno())  # from here on, what is printed is the choice of a stranger
    os.close(nowhere)
    refused = confine(limits[0]["memory"])
    write_message(answers, {"refused": refused})
    try:
        serve(requests, answers, limits[0]["cpu_seconds"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except OSError:
        os._exit(1)  # the parent has gone


if __name__ == "__main__":
    main()
