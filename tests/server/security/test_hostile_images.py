"""S7 to S13: files of strangers that call themselves images."""

from __future__ import annotations

import base64
import itertools
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.processing.test_decode_pool import (
    CPU_BOMB,
    HOSTILE,
    LARGE,
    SAMPLES,
    chunk,
    encode,
    exif,
    gif_of_frames,
    png_file,
    with_scans,
)
from tests.server.conftest import IMAGES, data_url
from tests.server.security.conftest import (
    DECODE_SECONDS,
    MAX_BODY,
    MAX_IMAGE,
    MAX_IMAGES,
    MIB,
    about,
    answer_about,
    chat,
    figure,
    refusal_of,
    wait_until,
)

WORD = Image.open(IMAGES / "word.png").convert("RGB")
SHAPES = Image.open(IMAGES / "shapes.png").convert("RGB")
WORD_PNG = (IMAGES / "word.png").read_bytes()
DATA = "data:image/png;base64,"


def url_of(data):
    return DATA + base64.b64encode(data).decode()


def answered_in_time(client, data, seconds=DECODE_SECONDS + 2):
    """200 or the refusal of that part, and soon."""
    started = time.monotonic()
    answered = chat(client, about(url_of(data)), max_tokens=1)
    assert time.monotonic() - started < seconds
    if answered.status_code != 200:
        assert answered.status_code == 400, answered.text
        assert answered.json()["error"]["param"] == "messages[0].content[1].image_url"
    return answered.status_code


# --- S7 ----------------------------------------------------------------------------------------------


NO_IMAGES = [
    "data:",
    "data:,",
    "data:image/png",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png,AAAA",
    "data:image/png;base32,AAAA",
    "data:image/png;charset=utf-8,AAAA",
    "data:image/png;base64,!!!!",
    "data:image/png;base64,AA-_",
    "data:image/png;base64,AAA",
    "data:image/png;base64,AAAAA",
    "data:image/png;base64,A=AA",
    "data:image/png;base64,AAAA\0",
    "data:image/png;base64,ＡＡＡＡ",
    "data:image/png;base64,AAAA,AAAA",
    "data:image/png;base64;base64,%41%41%41%41",
    "data:text/html;base64,PHNjcmlwdD4=",
    "data:image/svg+xml;base64,"
    + base64.b64encode(
        b'<!DOCTYPE s [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">'
        b'<image href="http://127.0.0.1/"/><text>&e;</text></svg>'
    ).decode(),
    DATA + "A" * 4,
    DATA + "A" * (MAX_IMAGE * 4 // 3 + 4),
    DATA + " " * (MAX_BODY - 1000),
    "data:" + "A" * (MAX_BODY - 1000),
]


@pytest.mark.security("S7")
def test_what_is_no_image_in_base64_is_refused(alice, network, each):
    network.news()
    for url in each(NO_IMAGES):
        assert "passwd" not in refusal_of(alice, url)
    assert network.news() == []


@pytest.mark.security("S7")
@pytest.mark.parametrize(
    "kind", ["image/jpeg", "image/svg+xml", "text/html", "", "IMAGE/PNG", "image/png;name=a.svg"]
)
def test_an_image_is_what_its_bytes_are(alice, kind):
    assert answer_about(alice, data_url("word.png").replace("image/png", kind)) == "WEMM"


@pytest.mark.security("S7")
def test_white_space_in_base64_is_let_through(alice):
    lines = base64.encodebytes(WORD_PNG).decode()
    for spelled in (lines, lines.replace("\n", "\r\n"), f" {lines}\t"):
        assert answer_about(alice, f"DATA:image/png;BASE64,{spelled}") == "WEMM"


@pytest.mark.security("S7")
def test_more_than_a_body_may_have_is_not_read(alice):
    refused = chat(alice, about(DATA + "A" * 40 * MIB))
    assert refused.status_code == 413
    assert refused.json()["error"]["code"] == "request_too_large"


@pytest.mark.security("S7")
def test_images_are_counted_before_any_is_decoded(alice, admin, neighbour):
    before = figure(admin, "wemm_decode_seconds_count")
    for count in (MAX_IMAGES + 1, 10_000):
        part = {"type": "image_url", "image_url": {"url": url_of(SAMPLES["png"]) if count < 100 else DATA}}
        messages = [
            {"role": "user", "content": [part] * (count // 2)},
            {"role": "user", "content": [part] * count},
        ]
        refused = chat(alice, messages)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages"
        assert f"images; at most {MAX_IMAGES}" in refused.json()["error"]["message"]
    assert figure(admin, "wemm_decode_seconds_count") == before


# --- S8 ----------------------------------------------------------------------------------------------


@pytest.mark.security("S8")
def test_odd_sizes_are_answered(alice, each):
    sizes = [(1, 1), (2, 2), (13, 13), (1, 65535), (65535, 1), (1, 300), (300, 1), (15, 14)]
    for size, mode in each(itertools.product(sizes, ("RGB", "1"))):
        assert answered_in_time(alice, encode(Image.new(mode, size))) == 200


@pytest.mark.security("S8")
def test_sizes_that_cannot_be_are_refused(alice, each):
    most = 2**31 - 1
    for size in each([(0, 0), (0, 1), (1, 0), (65535, 65535), (most, 1), (most, most), (2**32 - 1, 2**32 - 1)]):
        assert answered_in_time(alice, png_file(*size, bits=1, rows=bytes(100)), seconds=2) == 400


@pytest.mark.security("S8")
def test_the_largest_size_is_answered_and_no_larger(alice):
    assert answered_in_time(alice, LARGE) == 200
    refused = refusal_of(alice, url_of(png_file(7072, 7071, bits=1)))
    assert "7072x7071 pixels is too large; at most 50000000" in refused


# --- S9 ----------------------------------------------------------------------------------------------


BOMBS = [
    "30000x30000",
    "65535x65535",
    "beyond the limit",
    "IDAT beyond the size",
    "10000 IDAT",
    "apng of no frames",
]


@pytest.mark.security("S9")
def test_bombs_are_refused_by_their_headers_or_read_as_small_as_they_are(alice, neighbour, each):
    for name in each(BOMBS):
        answered_in_time(alice, HOSTILE[name], seconds=2)


@pytest.mark.security("S9")
def test_text_and_profiles_that_unpack_to_much(alice, neighbour, each):
    packer = zlib.compressobj()
    packed = b"".join([packer.compress(bytes(MIB)) for _ in range(256)]) + packer.flush()
    assert len(packed) < MIB
    for kind, head in each([(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")]):
        bomb = png_file(1, 1, rows=b"\0\7", chunks=[(kind, head + packed)])
        answered_in_time(alice, bomb, seconds=2)


@pytest.mark.security("S9")
def test_bombs_in_all_formats_at_once(guarded, alice, neighbour):
    """Each near the limit of pixels."""
    bombs = [encode(Image.new("1", (7000, 7000)), format) for format in ("PNG", "GIF")]
    bombs.append(encode(Image.new("L", (7000, 7000)), "JPEG", quality=1))
    assert max(map(len, bombs)) < MAX_IMAGE
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda bomb: answered_in_time(alice, bomb, 30), bombs))
    assert set(statuses) <= {200, 400}


# --- S10 ---------------------------------------------------------------------------------------------


@pytest.mark.security("S10")
def test_damaged_images_are_refused_or_answered(alice, each):
    for name in each(name for name in HOSTILE if name.startswith(("jpeg", "half a"))):
        answered_in_time(alice, HOSTILE[name])


@pytest.mark.security("S10")
def test_a_truncated_image_is_not_answered_about(alice):
    """Half grey, it would be answered wrong."""
    jpeg = encode(WORD, "JPEG", quality=95)
    assert answer_about(alice, url_of(jpeg)) == "WEMM"
    for data in (jpeg[:-128], jpeg[: len(jpeg) // 2], WORD_PNG[:-500], WORD_PNG[: len(WORD_PNG) // 2]):
        assert "damaged or truncated" in refusal_of(alice, url_of(data))
    flipped = bytearray(WORD_PNG)
    flipped[len(flipped) // 2] ^= 0xFF
    refusal_of(alice, url_of(bytes(flipped)))


@pytest.mark.security("S10")
def test_a_decoder_that_is_kept_busy_is_ended_and_replaced(alice):
    assert refusal_of(alice, url_of(CPU_BOMB)) == f"the image took longer than {DECODE_SECONDS} s to decode"
    assert answer_about(alice, data_url("word.png")) == "WEMM"


@pytest.mark.security("S10")
@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_who_sends_no_image_does_not_wait_for_decoders_that_are_kept_busy(alice, neighbour, path):
    """Who sends one waits for a decoder: one time limit after the other."""
    bomb = {"messages": about(url_of(with_scans((3000, 3000), 12_000)))}
    with ThreadPoolExecutor(8) as pool:
        bombs = [pool.submit(alice.post, path, json=bomb, timeout=120) for _ in range(8)]
        wait_until(lambda: any(bomb.done() for bomb in bombs))
        started = time.monotonic()
        # Not large enough for a thread of its own, and large enough.
        for size in (1, 400_000):
            assert chat(alice, [{"role": "user", "content": "?"}], unknown="a" * size).status_code == 200
        assert time.monotonic() - started < DECODE_SECONDS
        assert answer_about(alice, data_url("word.png")) == "WEMM"
        assert time.monotonic() - started < 4 * DECODE_SECONDS + 4
        refused = [bomb.result() for bomb in bombs]
    assert {answer.status_code for answer in refused} == {400}
    assert all(f"longer than {DECODE_SECONDS} s to decode" in answer.text for answer in refused)


# --- S11 ---------------------------------------------------------------------------------------------


@pytest.mark.security("S11")
@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "MPO"])
def test_of_several_frames_the_first_is_seen(alice, format):
    lossless = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "MPO" else {}
    blank = Image.new("RGB", WORD.size, "white")
    data = encode(WORD, format, save_all=True, append_images=[blank] * 3, **lossless)
    assert answer_about(alice, url_of(data)) == "WEMM"


@pytest.mark.security("S11")
def test_ten_thousand_frames_cost_as_much_as_one(alice):
    assert answered_in_time(alice, gif_of_frames(10_000), seconds=2) == 200
    assert answered_in_time(alice, gif_of_frames(100_000), seconds=2) == 200


UNKNOWN = ["tiff of pages", "tiff of floats", "jpeg in tiff", "heic", "avif", "psd", "ico", "eps", "pdf", "wmf"]
KNOWN_TO_PILLOW = ["TIFF", "PPM", "TGA", "PCX", "SGI", "ICNS", "JPEG2000", "DDS", "EPS", "PDF"]


@pytest.mark.security("S11")
def test_other_formats_are_refused_by_name(alice, each):
    for name in each(UNKNOWN):
        assert "formats JPEG, PNG, WEBP, GIF, BMP" in refusal_of(alice, url_of(HOSTILE[name]))


@pytest.mark.security("S11")
def test_no_other_decoder_of_the_library_is_reached(alice, each):
    for format in each(KNOWN_TO_PILLOW):
        with suppress(OSError, KeyError):  # a Pillow without it
            data = encode(WORD.resize((64, 64)), format)
            assert "formats JPEG, PNG, WEBP, GIF, BMP" in refusal_of(alice, url_of(data))


# --- S12 ---------------------------------------------------------------------------------------------


def as_16_bit(image):
    """Grey PNG of 16 bits; the low bytes make no difference to the eye."""
    samples = (np.asarray(image.convert("L")).astype(np.uint16) * 256 + 77).astype(">u2")
    return png_file(*image.size, bits=16, rows=b"".join(b"\0" + row.tobytes() for row in samples))


PALETTE = SHAPES.quantize(64)
BITS = WORD.convert("1", dither=Image.Dither.NONE)
GREY = WORD.convert("L")
LOSSLESS = {
    "palette": (encode(PALETTE), PALETTE),
    "palette, 1 transparent": (encode(PALETTE, transparency=63), PALETTE),
    "alpha": (encode(SHAPES.convert("RGBA")), SHAPES),
    "webp": (encode(SHAPES, "WEBP", lossless=True), SHAPES),
    "webp, alpha": (encode(SHAPES.convert("RGBA"), "WEBP", lossless=True), SHAPES),
    "gif": (encode(PALETTE, "GIF"), PALETTE),
    "bmp": (encode(SHAPES, "BMP"), SHAPES),
    "bmp, palette": (encode(PALETTE, "BMP"), PALETTE),
    "16 bits": (as_16_bit(WORD), GREY),
    "grey": (encode(GREY), GREY),
    "grey and alpha": (encode(WORD.convert("LA")), GREY),
    "1 bit": (encode(BITS), BITS),
    "1 bit, bmp": (encode(BITS, "BMP"), BITS),
    "profile": (encode(SHAPES, icc_profile=bytes(128)), SHAPES),
}
LOSSY = {
    "jpeg": encode(SHAPES, "JPEG", quality=95),
    "jpeg, subsampled": encode(SHAPES, "JPEG", quality=90, subsampling=2),
    "jpeg, progressive": encode(SHAPES, "JPEG", quality=90, progressive=True),
    "cmyk, inverted as Adobe does": encode(SHAPES.convert("CMYK"), "JPEG", quality=95),
    "webp": encode(SHAPES, "WEBP", quality=95),
}


def reading(client, data):
    """What the model makes of it, so exactly that one other pixel would show."""
    choice = chat(client, about(url_of(data)), logprobs=True, max_tokens=4).json()["choices"][0]
    return [token["logprob"] for token in choice["logprobs"]["content"]]


@pytest.mark.security("S12")
def test_the_pixels_are_those_of_the_same_image_in_rgb(alice, each):
    for name in each(LOSSLESS):
        data, image = LOSSLESS[name]
        assert reading(alice, data) == pytest.approx(reading(alice, encode(image.convert("RGB"))), abs=1e-4)


@pytest.mark.security("S12")
def test_colours_are_seen_as_they_are(alice, each):
    for name in each(LOSSY):
        [message] = about(url_of(LOSSY[name]))
        content = [message["content"][1], {"type": "text", "text": "What colour is the star?"}]
        answered = chat(alice, [{"role": "user", "content": content}])
        assert answered.json()["choices"][0]["message"]["content"] == "blue"


@pytest.mark.security("S12")
def test_what_is_transparent_is_white(alice):
    """The letters in the alpha channel alone, over black that is not seen."""
    drawn = Image.new("RGBA", WORD.size, (0, 0, 0, 0))
    drawn.putalpha(ImageOps.invert(GREY))
    assert answer_about(alice, url_of(encode(drawn))) == "WEMM"


# --- S13 ---------------------------------------------------------------------------------------------

TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""Orientation → how a camera held so would have stored it."""


@pytest.mark.security("S13")
def test_images_are_turned_upright(alice, each):
    for format, orientation in each(itertools.product(("JPEG", "PNG", "WEBP"), TURNED)):
        quality = {} if format == "PNG" else {"quality": 95}
        method = TURNED[orientation]
        stored = WORD if method is None else WORD.transpose(method)
        data = encode(stored, format, exif=exif(orientation), **quality)
        assert answer_about(alice, url_of(data)) == "WEMM"


@pytest.mark.security("S13")
def test_other_orientations_are_ignored(alice, each):
    for value in each([0, 9, 255, 65535]):
        assert answer_about(alice, url_of(encode(WORD, "JPEG", quality=95, exif=exif(value)))) == "WEMM"


@pytest.mark.security("S13")
def test_damaged_exif_is_ignored(alice):
    whole = exif(6)
    damaged = [whole[:length] for length in (6, 8, 12, 14, 20)]
    damaged += [exif(-1, kind=8), exif(6, kind=2), exif(6, kind=99)]
    damaged += [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 500]
    for block in damaged:
        assert answer_about(alice, url_of(encode(WORD, "JPEG", quality=95, exif=block))) == "WEMM"
    for name in ("mpf damaged", "exif cut off", "orientation -1"):
        answered_in_time(alice, HOSTILE[name])
    # In a PNG, by a chunk of its own that nothing checks.
    with_exif = WORD_PNG.replace(WORD_PNG[33:], chunk(b"eXIf", b"\xff" * 100) + WORD_PNG[33:])
    assert answer_about(alice, url_of(with_exif)) == "WEMM"
