"""`DecodePool`: the pixels of the image processor, made where hostile bytes can do no harm."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.checkpoint.config_file import parse_config
from wemm.config import PRESETS, ImageConfig
from wemm.errors import EngineError, MediaError, PromptError
from wemm.processing import decode_pool
from wemm.processing.decode_pool import DecodePool
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.media import FORMATS, MAX_IMAGE_BYTES, open_image
from wemm.processing.resize import image_config_for

TINY = parse_config(json.loads((BUNDLED_DIRECTORY / "tiny" / "config.json").read_text(encoding="utf-8")))
REAL, _ = PRESETS["wemm-chat-2k-cn"]
MIB = 2**20


# --- making files ------------------------------------------------------------------------------------


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width=37, height=23, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width, height, *, bits=8, color_type=0, rows=b"", chunks=(), pieces=1):
    """Written by hand; `rows` are the filtered scanlines, compressed and cut into so many IDAT chunks."""
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    packed = zlib.compress(rows)
    size = -(-len(packed) // pieces)
    parts = [(b"IHDR", header), *chunks]
    parts += [(b"IDAT", packed[i * size : (i + 1) * size]) for i in range(pieces)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in [*parts, (b"IEND", b"")])


def exif(value, kind=3):
    """An EXIF block with nothing but the tag of the orientation."""
    number = struct.pack("<HHI", 0x0112, kind, 1) + struct.pack("<i", value)
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + number + struct.pack("<I", 0)


def with_scans(size, count):
    """A progressive JPEG whose last scan, a few bytes that go over all coefficients, comes `count` times more."""
    data = encode(Image.new("L", size, 77), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def gif_of_frames(count):
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\xff\0\0\0\0\xff" + frame * count + b";"


PICTURE = noise()
FRAMES = [noise(seed=seed) for seed in range(3)]
PALETTE = PICTURE.quantize(16)
CPU_BOMB = with_scans((2000, 2000), 10_000)
"""About 20 s of decoding in 140 KB."""
LARGE = encode(Image.new("1", (5000, 4000)))
"""As RGB 80 MB."""
SAMPLES = {
    "jpeg": encode(PICTURE, "JPEG"),
    "jpeg, progressive": encode(PICTURE, "JPEG", progressive=True),
    "jpeg, grey": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg, cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "jpeg, turned": encode(PICTURE, "JPEG", exif=exif(6)),
    "jpeg, several pictures": encode(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]),
    "png": encode(PICTURE),
    "png, alpha": encode(noise(channels=4)),
    "png, grey and alpha": encode(noise(channels=2)),
    "png, palette": encode(PALETTE, transparency=3),
    "png, 1 bit": encode(PICTURE.convert("1")),
    "png, 16 bits": png_file(2, 2, bits=16, rows=b"\0\x12\x34\xff\x00" * 2),
    "png, 16 bits of colour": png_file(1, 2, bits=16, color_type=2, rows=b"\0\x12\x34\xff\x00\x00\xff" * 2),
    "png, turned": encode(PICTURE, exif=exif(8)),
    "png, ICC profile": encode(PICTURE, icc_profile=bytes(500), dpi=(72, 72)),
    "webp": encode(PICTURE, "WEBP"),
    "webp, alpha": encode(noise(channels=4), "WEBP", lossless=True),
    "webp, turned": encode(PICTURE, "WEBP", exif=exif(5)),
    "gif": encode(PICTURE, "GIF"),
    "gif, transparent": encode(PALETTE, "GIF", transparency=3),
    "bmp": encode(PICTURE, "BMP"),
    "bmp, palette": encode(PALETTE, "BMP"),
}
HOSTILE = {
    # sizes
    **{f"{w}x{h}": encode(Image.new("1", (w, h))) for w, h in [(1, 65535), (65535, 1), (1, 1), (2, 2), (13, 13)]},
    "65535x65535": png_file(65535, 65535, bits=1),
    "0x0": png_file(0, 0),
    "beyond the limit": png_file(7072, 7071, bits=1),
    # bombs
    "30000x30000": png_file(30000, 30000, bits=1, rows=bytes(10_000)),
    "zTXt": png_file(1, 1, rows=b"\0\7", chunks=[(b"zTXt", b"a\0\0" + zlib.compress(bytes(20 * MIB)))]),
    "iTXt": png_file(1, 1, rows=b"\0\7", chunks=[(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(20 * MIB)))]),
    "iCCP": png_file(1, 1, rows=b"\0\7", chunks=[(b"iCCP", b"a\0\0" + zlib.compress(bytes(20 * MIB)))]),
    "10000 IDAT": png_file(100, 100, rows=b"".join(b"\0" + os.urandom(100) for _ in range(100)), pieces=10_000),
    "IDAT beyond the size": png_file(1, 1, rows=bytes(20 * MIB)),
    # damage
    "jpeg 128 bytes short": SAMPLES["jpeg"][:-128],
    "jpeg of wrong Huffman codes": SAMPLES["jpeg"][:-300] + bytes([0xA5]) * 298 + b"\xff\xd9",
    "jpeg of restart markers": SAMPLES["jpeg"][:-2] + b"\xff\xd0\xff\xd1" * 32768 + b"\xff\xd9",
    "jpeg, arithmetic": SAMPLES["jpeg"].replace(b"\xff\xc0", b"\xff\xc9", 1),
    "jpeg of 100 scans": with_scans((64, 64), 100),
    "jpeg of nothing": b"\xff\xd8\xff\xd9",
    "jpeg in tiff": encode(PICTURE, "TIFF", compression="jpeg"),
    **{f"half a {name}": data[: len(data) // 2] for name, data in SAMPLES.items()},
    # more than one frame, other formats
    "gif of 10000 frames": gif_of_frames(10_000),
    "animated webp": encode(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "animated png": encode(FRAMES[0], save_all=True, append_images=FRAMES[1:]),
    "apng of no frames": png_file(1, 1, rows=b"\0\7", chunks=[(b"acTL", struct.pack(">II", 0, 0))]),
    "tiff of pages": encode(noise(), "TIFF", save_all=True, append_images=[noise(seed=1)]),
    "tiff of floats": encode(Image.new("F", (3, 3)), "TIFF"),
    "heic": struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64),
    "avif": struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1avif" + bytes(64),
    "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(64),
    "ico": encode(PICTURE, "ICO"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n",
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "nothing": b"",
    # orientation
    **{f"orientation {value}": encode(PICTURE, exif=exif(value)) for value in range(10)},
    "orientation -1": encode(PICTURE, "JPEG", exif=exif(-1, kind=8)),
    "exif cut off": encode(PICTURE, "JPEG", exif=exif(6)[:20]),
    "mpf damaged": SAMPLES["jpeg, several pictures"].replace(b"MPF\0", b"MPF\0\xff\xff", 1),
}


# --- helpers -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool():
    with DecodePool(TINY, 1) as pool:
        yield pool


def outcome(process, data):
    """The image, in what can be compared, or the message of the MediaError."""
    try:
        image = process(data)
    except MediaError as error:
        return str(error)
    return image.plan, image.sha256, image.pixels.numpy().tobytes()


def here(data, detail="auto", config=TINY, **options):
    return ImageProcessor(config).process(open_image(data, max_image_pixels=50_000_000, **options), detail)


def assert_works(pool):
    assert outcome(lambda data: pool.process(data).image, SAMPLES["png"]) == outcome(here, SAMPLES["png"])


def refusal(pool, data):
    with pytest.raises(MediaError) as caught:
        pool.process(data)
    return str(caught.value)


def worker_of(pool):
    """The only process of a pool, while it decodes or after."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for worker in [*pool._busy, *pool._idle]:
            if worker._started:
                return worker
        time.sleep(0.01)
    raise AssertionError("no worker has started")


def has_ended(pid, within=10):
    """Whether there is no such process any more, and no zombie of it: signal 0 would reach either."""
    deadline = time.monotonic() + within
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def pid_of(pool):
    return worker_of(pool)._process.pid


# --- the same pixels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("detail", ["auto", "low"])
@pytest.mark.parametrize("name", SAMPLES)
def test_the_image_is_what_the_image_processor_makes(pool, name, detail):
    decoded = pool.process(SAMPLES[name], detail)
    assert outcome(lambda data: decoded.image, name) == outcome(lambda data: here(data, detail), SAMPLES[name])
    assert decoded.original_size == open_image(SAMPLES[name]).size
    assert decoded.decode_seconds >= 0
    assert decoded.preprocess_seconds >= 0


def test_the_samples_are_of_all_formats():
    assert {Image.open(io.BytesIO(data), formats=FORMATS).format for data in SAMPLES.values()} >= set(FORMATS)


def test_reference_image_mode_is_the_same_as_here():
    with DecodePool(TINY, 1, reference_image_mode=True) as pool:
        for data in SAMPLES.values():
            expected = outcome(lambda data: here(data, reference_image_mode=True), data)
            assert outcome(lambda data: pool.process(data).image, data) == expected


def test_high_is_auto(pool):
    assert outcome(lambda data: pool.process(data, "high").image, LARGE) == outcome(here, LARGE)


def test_the_pixels_may_be_written(pool):
    pool.process(SAMPLES["png"]).image.pixels[0, 0, 0] = 7


def test_the_real_size_comes_through_the_pipe():
    with DecodePool(REAL, 1) as pool:
        image = pool.process(SAMPLES["jpeg"]).image
    assert image.pixels.shape == (1218, 1960, 3)
    assert image.sha256 == here(SAMPLES["jpeg"], config=REAL).sha256


# --- detail ------------------------------------------------------------------------------------------


def config_of(image, base=REAL):
    return dataclasses.replace(base, image=image)


def test_low_halves_the_edges_of_the_real_model():
    """378 would be 6.75 tokens."""
    assert image_config_for("low", REAL) == ImageConfig(shortest_edge=336, longest_edge=980)
    processor = ImageProcessor(REAL)
    assert processor.plan(1960, 1000, "low").resized == (980, 500)
    assert processor.plan(1960, 10, "low").resized == (980, 336)
    assert processor.plan(1960, 1960).num_tokens > 3.7 * processor.plan(1960, 1960, "low").num_tokens


@pytest.mark.parametrize("detail", ["auto", "high"])
def test_auto_and_high_are_the_models_own_rule(detail):
    assert image_config_for(detail, REAL) == REAL.image
    assert ImageProcessor(REAL).plan(300, 200, detail) == ImageProcessor(REAL).plan(300, 200)


@pytest.mark.parametrize(
    ("edges", "low"), [((100, 200), (50, 100)), ((112, 113), (56, 56)), ((1, 1), (1, 1)), ((3, 9), (1, 4))]
)
def test_edges_of_less_than_a_token_are_halved_as_they_are(edges, low):
    assert image_config_for("low", config_of(ImageConfig(*edges))) == ImageConfig(*low)


def test_a_fixed_size_has_one_detail():
    fixed = config_of(ImageConfig(fixed_size=(28, 42)))
    assert image_config_for("low", fixed) == fixed.image


@pytest.mark.parametrize("detail", ["medium", "", "LOW", None, 1, ["low"], "x" * 10**6])
def test_an_unknown_detail_is_refused(pool, detail):
    image = open_image(SAMPLES["png"])
    processor = ImageProcessor(TINY)
    for call in (
        lambda: image_config_for(detail, TINY),
        lambda: processor.plan(3, 3, detail),
        lambda: processor.process(image, detail),
        lambda: pool.process(SAMPLES["png"], detail),
    ):
        with pytest.raises(PromptError, match="auto, low or high") as caught:
            call()
        assert len(str(caught.value)) < 300


# --- hostile images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_image_is_refused_or_right_and_the_next_one_works(pool, name):
    pid = pid_of(pool) if pool._idle else None
    found = outcome(lambda data: pool.process(data).image, HOSTILE[name])
    assert found == outcome(here, HOSTILE[name])
    assert_works(pool)
    assert pid in (None, pid_of(pool)), "it should not have cost a worker"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("65535x65535", "too large"),
        ("30000x30000", "too large"),
        ("beyond the limit", "at most 50000000"),
        ("0x0", "not an image"),
        ("jpeg 128 bytes short", "truncated"),
        ("half a png", "truncated"),
        ("nothing", "empty"),
        *(
            (name, "not an image in one of the formats JPEG")
            for name in ("eps", "psd", "ico", "pdf", "wmf", "heic")
        ),
        *((name, "not an image in one of the formats JPEG") for name in ("tiff of pages", "jpeg in tiff", "avif")),
    ],
)
def test_why_it_is_refused(pool, name, reason):
    assert reason in refusal(pool, HOSTILE[name])


@pytest.mark.parametrize(
    "name", ["1x65535", "65535x1", "1x1", "13x13", "10000 IDAT", "gif of 10000 frames", "animated png"]
)
def test_odd_but_whole_images_are_decoded(pool, name):
    assert pool.process(HOSTILE[name]).original_size == Image.open(io.BytesIO(HOSTILE[name])).size


def test_too_many_bytes_are_refused_before_they_are_sent(pool):
    class Huge(bytes):
        def __len__(self):
            return MAX_IMAGE_BYTES + 1

    assert "at most" in refusal(pool, Huge())


def test_the_limit_of_pixels_is_the_pools():
    with DecodePool(TINY, 1, max_image_pixels=100) as pool:
        assert "at most 100, scale it down" in refusal(pool, SAMPLES["png"])
        pool.process(encode(noise(10, 10)))


# --- workers that die --------------------------------------------------------------------------------


def test_an_image_that_takes_too_long_is_given_up():
    with DecodePool(TINY, 1, timeout=1.0) as pool:
        started = time.monotonic()
        assert refusal(pool, CPU_BOMB) == "the image took longer than 1 s to decode"
        assert time.monotonic() - started < 15
        assert_works(pool)


def test_without_a_watch_the_system_stops_it(monkeypatch):
    """The second net: RLIMIT_CPU, renewed for each image."""
    monkeypatch.setattr(decode_pool._Worker, "deadline", lambda self, seconds: contextlib.nullcontext())
    with DecodePool(TINY, 1, timeout=0.0) as pool:
        assert_works(pool)
        assert refusal(pool, CPU_BOMB) == "the image took longer than 0 s to decode"
        assert_works(pool)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the memory of a process")
def test_an_image_that_takes_too_much_memory_is_given_up():
    with DecodePool(TINY, 1, memory=48 * MIB) as pool:
        assert refusal(pool, LARGE) == "the image took more than 48 MiB to decode"
        assert_works(pool)
        large_file = encode(noise(1000, 1000), "BMP") + bytes(60 * MIB)
        assert refusal(pool, large_file) == "the image took more than 48 MiB to decode"
        assert_works(pool)


def test_a_worker_killed_in_the_middle_of_an_image():
    with DecodePool(TINY, 1) as pool, ThreadPoolExecutor(1) as thread:
        assert_works(pool)
        pid = pid_of(pool)
        answer = thread.submit(refusal, pool, CPU_BOMB)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert answer.result(10) == "the image could not be decoded: its decoder ended with signal 9"
        assert_works(pool)
        assert pid_of(pool) != pid


def test_a_worker_killed_between_two_images():
    with DecodePool(TINY, 1) as pool:
        assert_works(pool)
        os.kill(pid_of(pool), signal.SIGKILL)
        time.sleep(0.1)
        assert_works(pool)


def test_a_worker_survives_the_thread_that_asked_first():
    """On Linux it dies with the thread that started it: that must be one of the pool."""
    with DecodePool(TINY, 1) as pool:
        thread = threading.Thread(target=assert_works, args=(pool,))
        thread.start()
        thread.join()
        pid = pid_of(pool)
        time.sleep(0.1)
        assert_works(pool)
        assert pid_of(pool) == pid


# --- workers that lie --------------------------------------------------------------------------------

LIES = {
    "no length": b"\0\0",
    "no JSON": (b"{", b""),
    "no object": (b"[]", b""),
    "not UTF-8": (b"\xff", b""),
    "too deep": (b"[" * 16000, b""),
    "too long": (b" " * 17000, b""),
    "pickle": (b"\x80\x04.", b""),
    "nothing in it": (b"{}", b""),
    "no pixels": ({}, b""),
    "too few": ({}, bytes(99)),
    "another size": ({"original_size": [1, 99]}, None),
    "no size": ({"original_size": [0, 5]}, None),
    "negative": ({"original_size": [-37, -23]}, None),
    "text": ({"original_size": ["37", "23"]}, None),
    "too many": ({"original_size": [10**6, 10**6]}, None),
    "not a number": ({"seconds": [float("nan"), 0.0]}, None),
    "no time": ({"seconds": 1}, None),
}


LIAR = """
    import struct, sys
    def read():
        header_len, payload_len = struct.unpack(">IQ", sys.stdin.buffer.read(12))
        sys.stdin.buffer.read(header_len + payload_len)
    read()
    ready = b'{"refused": []}'
    sys.stdout.buffer.write(struct.pack(">IQ", len(ready), 0) + ready)
    sys.stdout.buffer.flush()
    read()
    sys.stdout.buffer.write(open(sys.argv[1], "rb").read())
"""


@pytest.fixture
def lying_pool(monkeypatch, tmp_path):
    """A function: a pool whose workers answer an image with these bytes."""
    start = subprocess.Popen
    command = [sys.executable, "-S", "-c", textwrap.dedent(LIAR), str(tmp_path / "answer")]

    def make(answer):
        (tmp_path / "answer").write_bytes(answer)
        monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(command, **options))
        return DecodePool(TINY, 1)

    return make


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_cannot_be_is_refused(lying_pool, name):
    lie = LIES[name]
    if isinstance(lie, tuple):
        header, pixels = lie
        if isinstance(header, dict):
            header = json.dumps({"original_size": [37, 23], "seconds": [0.1, 0.1], **header}).encode()
            width, height = ImageProcessor(TINY).plan(37, 23).resized
            pixels = bytes(3 * width * height) if pixels is None else pixels
        lie = struct.pack(">IQ", len(header), len(pixels)) + header + pixels
    with lying_pool(lie) as pool:
        assert refusal(pool, SAMPLES["png"]).startswith("the image could not be decoded: its decoder ended")
        assert pool._idle == []


def test_the_words_of_a_worker_are_made_harmless(lying_pool):
    header = json.dumps({"problem": "a\n\x1b[31m\ud800" + "b" * 1000}).encode()
    with lying_pool(struct.pack(">IQ", len(header), 0) + header) as pool:
        message = refusal(pool, SAMPLES["png"])
    assert message.startswith("a??[31m?bbb")
    assert len(message) == 500


# --- starting and ending -----------------------------------------------------------------------------


@pytest.mark.parametrize("executable", ["/bin/false", "/no/such/python"])
def test_a_worker_that_does_not_start_is_not_the_callers_fault(monkeypatch, executable):
    with DecodePool(TINY, 1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", executable)
            with pytest.raises(EngineError, match="process that decodes images"):
                pool.process(SAMPLES["png"])
        assert_works(pool)


def test_four_threads_share_two_workers(monkeypatch):
    started = []

    class Counted(decode_pool._Worker):
        def __init__(self):
            super().__init__()
            started.append(self)

    monkeypatch.setattr(decode_pool, "_Worker", Counted)
    names = [*SAMPLES, *HOSTILE]
    files = {**SAMPLES, **HOSTILE}
    with DecodePool(TINY, 2) as pool, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda name: outcome(lambda data: pool.process(data).image, files[name]), names))
    assert found == [outcome(here, files[name]) for name in names]
    assert len(started) == 2


def test_nothing_is_left_after_close():
    pool = DecodePool(TINY, 3)
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(pool.process, [SAMPLES["png"]] * 9))
    pids = [worker._process.pid for worker in pool._idle]
    os.kill(pids[0], signal.SIGKILL)
    pool.close()
    pool.close()
    assert all(has_ended(pid, within=0) for pid in pids)
    with pytest.raises(EngineError, match="closed"):
        pool.process(SAMPLES["png"])


def test_close_does_not_wait_for_an_image():
    pool = DecodePool(TINY, 1)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(pool.process, CPU_BOMB) for _ in range(2)]
        worker_of(pool)
        pool.close()
        for answer in answers:
            with pytest.raises(EngineError, match="closed"):
                answer.result(10)
    assert not pool._busy
    assert not pool._idle


ORPHAN = """
    import os, subprocess, sys
    from wemm.processing.decode_worker import read_header, write_message
    held = os.dup(sys.stdout.fileno())
    worker = subprocess.Popen(
        [sys.executable, "-m", "wemm.processing.decode_worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[held],
    )
    write_message(worker.stdin, {"memory": 2**30, "cpu_seconds": 60})
    read_header(worker.stdout)
    request = {"edges": [56, 112, None], "reference_image_mode": False, "max_image_pixels": 10**7}
    write_message(worker.stdin, request, sys.stdin.buffer.read())
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends with the image it is at")
def test_a_worker_ends_with_its_parent():
    """`run` returns when nobody holds the other end of the pipe any more."""
    command = [sys.executable, "-c", textwrap.dedent(ORPHAN)]
    started = time.monotonic()
    subprocess.run(command, input=CPU_BOMB, stdout=subprocess.PIPE, check=True)
    assert time.monotonic() - started < 10


# --- confinement -------------------------------------------------------------------------------------


def test_the_worker_does_not_import_torch():
    command = [sys.executable, "-X", "importtime", "-m", "wemm.processing.decode_worker"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert {"PIL.Image", "numpy", "wemm.processing.resize"} <= imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "sentencepiece")}


def test_no_secret_is_in_the_environment_of_a_worker(monkeypatch):
    monkeypatch.setenv("WEMM_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    environment = decode_pool._environment()
    assert "secret" not in environment.values()
    ours = {"PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert set(environment) <= {*decode_pool._INHERITED, *ours}
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(Path.cwd())


CONFINED = """
    import ctypes, json, os, resource, signal, socket, sys
    from wemm.processing.decode_worker import confine, preload
    from wemm.processing.media import open_image
    file = open(sys.argv[1], "wb", buffering=0)
    preload()
    refused = confine(64 * 2**20)

    def attempt(action):
        try:
            action()
        except (OSError, MemoryError, ImportError, ValueError) as error:
            return type(error).__name__
        return None

    answer = {
        "refused": list(refused),
        "read": attempt(lambda: open("/etc/passwd")),
        "write": attempt(lambda: open(sys.argv[1] + ".new", "wb")),
        "write to an open file": attempt(lambda: file.write(b"x")),
        "socket": attempt(socket.socket),
        "pipe": attempt(os.pipe),
        "import": attempt(lambda: __import__("wave")),
        "more files": attempt(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))),
        "memory": attempt(lambda: bytearray(128 * 2**20)),
        "less memory": attempt(lambda: bytearray(16 * 2**20)),
        "image": attempt(lambda: open_image(sys.stdin.buffer.read())),
    }
    if os.getuid() != 0:
        answer["fork"] = attempt(os.fork)
    print(json.dumps(answer))
"""


def test_a_confined_process_can_open_nothing(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(CONFINED), str(tmp_path / "file")]
    result = subprocess.run(command, input=SAMPLES["jpeg, turned"], stdout=subprocess.PIPE, check=True)
    answer = json.loads(result.stdout)
    assert answer.pop("image") is None
    assert answer.pop("less memory") is None
    if sys.platform == "linux":
        assert answer.pop("refused") == []
        assert answer.pop("memory") == "MemoryError"
    else:
        del answer["refused"], answer["memory"]
    assert {name for name, error in answer.items() if error is None} == set()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b""


def test_what_the_system_refuses_is_logged_once(monkeypatch, caplog):
    with DecodePool(TINY, 1) as pool:
        assert_works(pool)
        worker_of(pool).refused = ["RLIMIT_AS"]
        for _ in range(2):
            assert_works(pool)
    assert [record.message for record in caplog.records] == [
        "this system does not confine the decoding of images by RLIMIT_AS"
    ]
