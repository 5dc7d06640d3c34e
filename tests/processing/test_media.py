"""`open_image`: whatever arrives becomes the RGB picture a person would see, or a `MediaError`."""

from __future__ import annotations

import base64
import io
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from wemm.errors import MediaError
from wemm.processing.media import FORMATS, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, open_image

FUZZ = settings(
    max_examples=400, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink)
)


# --- making files ------------------------------------------------------------------------------------


def encode(image, format="PNG", **options):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width=19, height=13, channels=3, seed=0):
    """Random pixels: no two rows or columns alike, and nothing a codec could skip."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_file(width, height, *, bits=8, color_type=0, rows=b"", chunks=()):
    """A PNG file written by hand, for what Pillow does not write. `rows` are the filtered scanlines."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + data + chunk(b"IEND", b"")


ORIENTATION, SHORT, LONG, ASCII, RATIONAL, DOUBLE, SIGNED_SHORT = 0x0112, 3, 4, 2, 5, 12, 8
X_RESOLUTION, MAKE = 0x011A, 0x010F


def orientation_tag(value):
    return ORIENTATION, SHORT, 1, struct.pack("<H", value)


def exif(*tags):
    """An EXIF block written by hand: tags are (number, type, count, data)."""
    offset = 8 + 2 + 12 * len(tags) + 4
    table, overflow = struct.pack("<H", len(tags)), b""
    for number, kind, count, data in tags:
        value = data.ljust(4, b"\0")
        if len(data) > 4:
            value = struct.pack("<I", offset + len(overflow))
            overflow += data
        table += struct.pack("<HHI", number, kind, count) + value
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + table + struct.pack("<I", 0) + overflow


def pixels(source, **options):
    image = open_image(source, **options)
    assert image.mode == "RGB"
    return np.array(image)


def refusal(source, **options):
    """The message of the MediaError; it is always one line, and never a whole file pasted in."""
    with pytest.raises(MediaError) as caught:
        open_image(source, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["str", "Path", "bytes", "bytearray", "memoryview", "PIL", "data URL"])
def test_every_kind_of_source_gives_the_same_pixels(kind, tmp_path):
    picture = noise()
    path = tmp_path / "图 片 (1).PNG"
    data = encode(Image.fromarray(picture))
    path.write_bytes(data)
    source = {
        "str": str(path),
        "Path": path,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "PIL": Image.fromarray(picture),
        "data URL": "data:image/png;base64," + base64.b64encode(data).decode(),
    }[kind]
    assert np.array_equal(pixels(source), picture)


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(noise())))
    assert np.array_equal(pixels("~/a.png"), noise())


def test_a_pil_image_of_the_caller_is_left_as_it_was():
    mine = Image.fromarray(noise(channels=4))
    before = mine.tobytes()
    open_image(mine)
    assert (mine.mode, mine.tobytes()) == ("RGBA", before)


def test_the_name_of_a_file_says_nothing_about_its_format(tmp_path):
    path = tmp_path / "really_a_bmp.jpg"
    path.write_bytes(encode(Image.fromarray(noise()), "BMP"))
    assert np.array_equal(pixels(path), noise())


# --- EXIF orientation --------------------------------------------------------------------------------

UPRIGHT = noise(6, 4)
STORED = {  # what a camera stores so that orientation k shows UPRIGHT (EXIF 2.3, table of tag 0x0112)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(UPRIGHT, -1),
}


def oriented(stored, exif_block, format="PNG"):
    lossless = {"lossless": True} if format == "WEBP" else {}
    return encode(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif_block, **lossless)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_gives_the_upright_picture(orientation, format):
    data = oriented(STORED[orientation], exif(orientation_tag(orientation)), format)
    assert np.array_equal(pixels(data), UPRIGHT)


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_of_a_jpeg_is_applied(orientation):
    """JPEG is lossy: compared with the decoded pixels turned by hand."""
    data = oriented(STORED[orientation], exif(orientation_tag(orientation)), "JPEG")
    turned = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, 1),
    }.get(orientation, np.asarray)
    assert np.array_equal(pixels(data), turned(np.array(Image.open(io.BytesIO(data)))))


def test_exif_orientation_of_a_pil_image_is_applied():
    image = Image.open(io.BytesIO(oriented(STORED[6], exif(orientation_tag(6)))))
    assert np.array_equal(pixels(image), UPRIGHT)


def test_orientation_and_transparency_are_both_applied():
    stored = np.dstack([STORED[6], np.full(STORED[6].shape[:2], 255, np.uint8)])
    stored[0, 0] = (10, 20, 30, 0)  # top left as stored: top right when turned clockwise
    upright = UPRIGHT.copy()
    upright[0, -1] = 255
    assert np.array_equal(pixels(oriented(stored, exif(orientation_tag(6)))), upright)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(exif(orientation_tag(0)), id="0"),
        pytest.param(exif(orientation_tag(9)), id="9"),
        pytest.param(exif(orientation_tag(65535)), id="65535"),
        pytest.param(exif((ORIENTATION, SIGNED_SHORT, 1, struct.pack("<h", -6))), id="negative"),
        pytest.param(exif((ORIENTATION, ASCII, 4, b"six\0")), id="text"),
        pytest.param(exif((ORIENTATION, SHORT, 0, b"")), id="no value"),
        pytest.param(exif((ORIENTATION, LONG, 1, struct.pack("<I", 2**32 - 1))), id="2**32-1"),
        pytest.param(exif((ORIENTATION, DOUBLE, 1, struct.pack("<d", float("nan")))), id="NaN"),
        pytest.param(exif((ORIENTATION, RATIONAL, 1, struct.pack("<II", 6, 0))), id="6/0"),
        pytest.param(exif(orientation_tag(6))[:20], id="truncated"),
        pytest.param(b"Exif\0\0II*\0" + struct.pack("<I", 2**31), id="offset outside"),
        pytest.param(b"Exif\0\0garbage and more garbage", id="garbage"),
        pytest.param(b"Exif\0\0", id="empty"),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_an_orientation_that_makes_no_sense_is_no_orientation(block, format):
    assert np.array_equal(pixels(oriented(UPRIGHT, block, format)), pixels(oriented(UPRIGHT, b"", format)))


@pytest.mark.parametrize(
    "other",
    [
        pytest.param((X_RESOLUTION, DOUBLE, 1, struct.pack("<d", float("nan"))), id="NaN resolution"),
        pytest.param((X_RESOLUTION, ASCII, 3, b"72\0"), id="resolution as text"),
        pytest.param((X_RESOLUTION, SHORT, 2, struct.pack("<HH", 72, 1)), id="resolution as two numbers"),
        pytest.param((MAKE, RATIONAL, 1, struct.pack("<II", 1, 1)), id="maker as a fraction"),
        pytest.param((0x8769, LONG, 1, struct.pack("<I", 2**32 - 1)), id="sub-directory outside the file"),
        pytest.param((MAKE, ASCII, 2**30, struct.pack("<I", 8)), id="maker of 1 GB"),
    ],
)
def test_other_exif_tags_do_not_spoil_the_orientation(other):
    """Cameras and editors write odd tags; the picture is upright all the same."""
    data = oriented(STORED[6], exif(orientation_tag(6), other))
    assert np.array_equal(pixels(data), UPRIGHT)


@settings(FUZZ, max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from([0x010F, 0x011A, 0x0131, 0x0132, 0x0213, 0x02BC, 0x8298, 0x8769, 0x8825, 0xA005]),
                st.integers(0, 0xFFFF),
            ).filter(lambda number: number != ORIENTATION),
            st.integers(0, 20),
            st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)),
            st.binary(max_size=12),
        ),
        max_size=4,
    )
)
def test_no_exif_tag_whatever_it_holds_spoils_the_orientation(tags):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(oriented(STORED[6], exif(orientation_tag(6), *tags))), UPRIGHT)


# --- transparency ------------------------------------------------------------------------------------


def on_white(color, alpha):
    """`color` at `alpha` of 255 over white, exactly; Pillow rounds to a neighbour."""
    color, alpha = np.asarray(color, float), np.asarray(alpha, float)[..., None] / 255
    return color * alpha + 255 * (1 - alpha)


def test_rgba_is_composited_on_white():
    rgba = noise(16, 16, 4)
    rgba[0, 0], rgba[0, 1] = (0, 0, 0, 0), (1, 2, 3, 255)
    result = pixels(encode(Image.fromarray(rgba)))
    assert result[0, 0].tolist() == [255, 255, 255]
    assert result[0, 1].tolist() == [1, 2, 3]
    assert np.abs(result - on_white(rgba[..., :3], rgba[..., 3])).max() <= 1


def test_grey_with_alpha_is_composited_on_white():
    la = noise(16, 16, 2)
    result = pixels(encode(Image.fromarray(la, "LA") if la.ndim == 2 else Image.merge("LA", _bands(la))))
    assert np.abs(result - on_white(la[..., :1].repeat(3, 2), la[..., 1])).max() <= 1


def _bands(array):
    return [Image.fromarray(np.ascontiguousarray(array[..., i])) for i in range(array.shape[-1])]


def palette_image(indices, colors):
    image = Image.fromarray(np.asarray(indices, np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([sample for color in colors for sample in color])
    return image


def test_palette_with_trns_is_composited_on_white():
    """Several alphas (tRNS with one entry per colour)."""
    colors = [(200, 0, 0), (0, 100, 0), (0, 0, 50)]
    image = palette_image([[0, 1, 2]], colors)
    result = pixels(encode(image, transparency=bytes([0, 128, 255])))
    assert np.abs(result[0] - on_white(colors, [0, 128, 255])).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(format):
    image = palette_image([[0, 1, 2]], [(200, 0, 0), (0, 100, 0), (0, 0, 50)])
    result = pixels(encode(image, format, transparency=1))
    assert result[0].tolist() == [[200, 0, 0], [255, 255, 255], [0, 0, 50]]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [("RGB", (1, 2, 3), [255, 255, 255]), ("L", 7, [255, 255, 255]), ("1", 0, [255, 255, 255])],
)
def test_a_transparent_colour_key_is_white(mode, color, expected):
    data = encode(Image.new(mode, (2, 2), color), transparency=color)
    assert pixels(data)[0, 0].tolist() == expected


def test_webp_alpha_is_composited_on_white():
    data = encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", lossless=True)
    assert (pixels(data) == 255).all()


# --- pixel formats -----------------------------------------------------------------------------------


def test_a_palette_gives_its_colours():
    colors = [(9, 8, 7), (200, 100, 50)]
    image = palette_image([[0, 1], [1, 0]], colors)
    assert pixels(encode(image)).tolist() == [[[9, 8, 7], [200, 100, 50]], [[200, 100, 50], [9, 8, 7]]]


def test_one_bit_is_black_and_white():
    bits = np.array([[True, False, True], [False, False, True]])
    assert np.array_equal(pixels(encode(Image.fromarray(bits))), (bits * 255)[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("sample", "grey"), [(0x0000, 0), (0x01FF, 1), (0x8000, 0x80), (0xFF00, 255), (0xFFFF, 255)]
)
def test_16_bit_grey_keeps_its_high_byte(sample, grey):
    """Pillow's own conversion would clip: every sample from 255 up becomes white."""
    row = b"\0" + struct.pack(">H", sample)
    assert pixels(png_file(1, 1, bits=16, color_type=0, rows=row)).tolist() == [[[grey] * 3]]


def test_16_bit_grey_of_a_pil_image_keeps_its_high_byte():
    assert pixels(Image.new("I;16", (1, 1), 0x8000)).tolist() == [[[0x80] * 3]]


def test_16_bit_colour_keeps_its_high_bytes():
    row = b"\0" + struct.pack(">HHH", 0x1234, 0xFF00, 0x00FF)
    assert pixels(png_file(1, 1, bits=16, color_type=2, rows=row)).tolist() == [[[0x12, 0xFF, 0x00]]]


def test_cmyk_jpeg_is_converted_as_pillow_converts_it():
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, 16:, 0] = 255  # left: bare paper; right: full cyan
    data = encode(Image.merge("CMYK", _bands(ink)), "JPEG", quality=95)
    result = pixels(data)
    assert np.array_equal(result, np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(result[8, 4].astype(int) - [255, 255, 255]).max() < 8
    assert np.abs(result[8, 28].astype(int) - [0, 255, 255]).max() < 8


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (65500, 1)])
def test_extreme_sizes_open(size):
    data = encode(Image.new("RGB", size, (1, 2, 3)))
    assert open_image(data).size == size


def test_bmp_opens():
    assert np.array_equal(pixels(encode(Image.fromarray(noise()), "BMP")), noise())


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_of_an_animation_the_first_frame_is_taken(format, options):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (8, 8), color) for color in colors]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert (pixels(data) == [255, 0, 0]).all()


# --- the original's behaviour ------------------------------------------------------------------------

REFERENCE_SAMPLES = {
    "rgb": encode(Image.fromarray(noise())),
    "rgba": encode(Image.fromarray(noise(channels=4))),
    "la": encode(Image.merge("LA", _bands(noise(channels=2)))),
    "grey": encode(Image.fromarray(noise(channels=1))),
    "16-bit grey": png_file(2, 1, bits=16, rows=b"\0" + struct.pack(">HH", 100, 0x8000)),
    "palette, one alpha": encode(palette_image([[0, 1]], [(1, 2, 3), (4, 5, 6)]), transparency=1),
    "palette, many alphas": encode(palette_image([[0, 1]], [(1, 2, 3), (4, 5, 6)]), transparency=b"\x40\x80"),
    "turned": oriented(STORED[6], exif(orientation_tag(6))),
    "cmyk": encode(Image.fromarray(noise()).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("name", REFERENCE_SAMPLES)
def test_reference_image_mode_is_plain_pil_convert(name):
    data = REFERENCE_SAMPLES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data, reference_image_mode=True), expected)


def test_reference_image_mode_ignores_orientation():
    data = oriented(STORED[6], exif(orientation_tag(6)))
    assert np.array_equal(pixels(data, reference_image_mode=True), STORED[6])


def test_reference_image_mode_drops_alpha():
    data = encode(Image.new("RGBA", (1, 1), (1, 2, 3, 0)))
    assert pixels(data, reference_image_mode=True).tolist() == [[[1, 2, 3]]]


def test_reference_image_mode_clips_16_bit_grey():
    row = b"\0" + struct.pack(">HH", 100, 0x8000)
    data = png_file(2, 1, bits=16, rows=row)
    assert pixels(data, reference_image_mode=True).tolist() == [[[100] * 3, [255] * 3]]


# --- refusals: not an image --------------------------------------------------------------------------

PICTURE = Image.fromarray(noise(64, 48))
TRUNCATED = {
    "jpeg, half": encode(PICTURE, "JPEG")[:1500],
    "jpeg, 128 bytes short": encode(PICTURE, "JPEG", quality=95)[:-128],
    "png, half": encode(PICTURE)[:4000],
    "gif, half": encode(PICTURE, "GIF")[:1800],
    "bmp, half": encode(PICTURE, "BMP")[:5000],
}
NOT_IMAGES = {
    "text": b"Just some notes.\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>',
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "psd": b"8BPS\0\1" + b"\0" * 6 + b"\0\3" + b"\0\0\0\1\0\0\0\1\0\x08\0\3" + b"\0" * 64,
    "tiff": encode(PICTURE, "TIFF"),
    "ico": encode(PICTURE, "ICO"),
    "ppm": encode(PICTURE, "PPM"),
    "zeros": bytes(1000),
    "one byte": b"\x89",
    "0x0 png": png_file(0, 0),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_other_formats_are_refused_and_the_accepted_ones_named(name):
    message = refusal(NOT_IMAGES[name])
    assert all(format in message for format in FORMATS)
    assert "damaged" not in message


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_image_is_refused_never_half_grey(name):
    message = refusal(TRUNCATED[name])
    assert "truncated" in message
    assert name.partition(",")[0].upper() in message


def test_a_truncated_webp_is_refused():
    """Pillow's WebP decoder cannot tell half a file from no WebP at all, so the message cannot either."""
    refusal(encode(PICTURE, "WEBP")[:700])


@pytest.mark.parametrize("name", TRUNCATED)
def test_a_truncated_image_is_refused_in_reference_image_mode_too(name):
    refusal(TRUNCATED[name], reference_image_mode=True)


def test_a_truncated_pil_image_is_refused():
    """Pillow decodes lazily: an image the caller opened may still turn out to be damaged."""
    assert "truncated" in refusal(Image.open(io.BytesIO(TRUNCATED["jpeg, half"])))


def test_a_closed_pil_image_is_refused():
    image = Image.new("RGB", (2, 2))
    image.close()
    assert "closed" in refusal(image)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    assert f"{size[0]}x{size[1]}" in refusal(Image.new("RGB", size))


@pytest.mark.parametrize("empty", [b"", bytearray(), memoryview(b"")])
def test_no_bytes_are_refused(empty):
    assert "empty" in refusal(empty)


@pytest.mark.parametrize("source", [3, 1.5, None, [], ["a.png"], {}, object(), True, noise()])
def test_a_source_of_another_type_is_refused_by_its_type(source):
    message = refusal(source)
    assert type(source).__name__ in message
    assert "path, bytes, a data: URL or a PIL image" in message


# --- refusals: files ---------------------------------------------------------------------------------


def test_a_missing_file_is_refused_by_its_path(tmp_path):
    message = refusal(tmp_path / "no.png")
    assert str(tmp_path / "no.png") in message
    assert "No such file" in message


def test_a_directory_is_refused(tmp_path):
    message = refusal(str(tmp_path))
    assert str(tmp_path) in message
    assert "not a regular file" in message


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    message = refusal(tmp_path / "empty.png")
    assert "empty.png" in message
    assert "0 bytes" in message


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refusal(tmp_path / "pipe.png")


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="no /dev/null on this system")
@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_device_is_refused(tmp_path, through_a_link):
    """/dev/null stands for /dev/zero, which is refused alike but would fill the memory were it read."""
    path = tmp_path / "link.png"
    path.symlink_to("/dev/null")
    assert "not a regular file" in refusal(path if through_a_link else "/dev/null")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("a\0b.png", id="NUL in the name"),
        pytest.param("x" * 300 + ".png", id="name too long"),
        pytest.param("\ud800.png", id="lone surrogate"),
        pytest.param("two\nlines.png", id="newline in the name"),
        pytest.param("", id="empty name"),
        pytest.param("~no-such-user-here/a.png", id="home of an unknown user"),
    ],
)
def test_a_path_that_cannot_exist_is_refused(path):
    refusal(path)


@pytest.mark.parametrize("content", ["text", "truncated jpeg", "truncated png", "bomb"])
def test_a_refused_file_is_named(content, tmp_path):
    """A batch of a thousand files is of no use to somebody who is not told which one is broken."""
    path = tmp_path / "broken.bin"
    path.write_bytes(
        {
            "text": NOT_IMAGES["text"],
            "truncated jpeg": TRUNCATED["jpeg, half"],
            "truncated png": TRUNCATED["png, half"],
            "bomb": png_file(30000, 30000, bits=1),
        }[content]
    )
    assert "broken.bin" in refusal(path)


# --- refusals: too large -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height"), [(10001, 10000), (10000, 10001), (30000, 30000), (65535, 65535), (2**31 - 1, 2**31 - 1)]
)
def test_too_many_pixels_are_refused_from_the_header(width, height):
    """The files end after the header: had anything been decoded, they would be called truncated."""
    message = refusal(png_file(width, height, bits=1))
    assert "too large" in message
    assert f"{width}x{height}" in message or str(width * height) in message
    assert str(MAX_IMAGE_PIXELS) in message
    assert "scale it down" in message
    assert "damaged" not in message


def test_the_largest_allowed_size_passes_the_header_check():
    assert "truncated" in refusal(png_file(10000, 10000, bits=1))


def test_a_small_file_with_900_million_pixels_is_refused():
    compressor = zlib.compressobj(9)
    row = bytes(1 + 30000 // 8)
    packed = b"".join(compressor.compress(row) for _ in range(30000)) + compressor.flush()
    bomb = png_file(30000, 30000, bits=1).replace(
        struct.pack(">I", len(zlib.compress(b""))) + b"IDAT" + zlib.compress(b""),
        struct.pack(">I", len(packed)) + b"IDAT" + packed,
    )
    assert len(packed) < len(bomb) < 200_000
    assert "too large" in refusal(bomb)


@pytest.mark.parametrize("format", ["GIF", "BMP", "WEBP"])
def test_size_bombs_of_other_formats_are_refused_from_the_header(format):
    data = {
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)  # the frame is larger than the screen
        + b"\x2c" + struct.pack("<HHHHB", 0, 0, 11000, 11000, 0) + b"\x02\x02L\x01\0;",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 20000, 20000, 1, 24, 0, 0, 0, 0, 0, 0),
        "WEBP": b"RIFF" + struct.pack("<I", 38) + b"WEBPVP8L" + struct.pack("<I", 26) + b"\x2f"
        + struct.pack("<I", 11999 | 11999 << 14) + bytes(21),
    }[format]  # fmt: skip
    assert "too large" in refusal(data)


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)  # a hole: takes no disk

    def read(*args, **kwargs):
        raise AssertionError("the file was opened")

    monkeypatch.setattr(io, "open", read)
    monkeypatch.setattr("builtins.open", read)
    message = refusal(path)
    assert str(MAX_IMAGE_BYTES + 1) in message
    assert str(MAX_IMAGE_BYTES) in message


def test_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr("wemm.processing.media.MAX_IMAGE_BYTES", 1000)
    message = refusal(bytes(1001))
    assert "1001" in message
    assert "at most 1000" in message
    assert "at most" not in refusal(bytes(1000))


def test_a_data_url_of_too_many_bytes_is_refused_before_it_is_decoded(monkeypatch):
    """It is not base64 either; decoding it would have said so."""
    monkeypatch.setattr("wemm.processing.media.MAX_IMAGE_BYTES", 1000)
    assert "at most 1000" in refusal("data:image/png;base64," + "*" * 2000)


# --- URLs --------------------------------------------------------------------------------------------

PNG_BASE64 = base64.b64encode(encode(Image.fromarray(noise()))).decode()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/a.png",
        "HTTPS://example.com/a.png",
        "file:///etc/passwd",
        "file://localhost/etc/passwd#a.jpg",
        "FILE:///etc/passwd",
        "ftp://example.com/a.png",
        "gopher://example.com/",
        "unix:/run/socket",
    ],
)
def test_urls_are_not_fetched(url):
    message = refusal(url)
    assert url.partition(":")[0] in message
    assert "give a path, bytes or a data: URL" in message


@pytest.mark.parametrize(
    "header",
    [
        "data:image/png;base64,",
        "data:image/jpeg;base64,",  # a wrong label: the bytes decide
        "data:text/html;base64,",
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/png;charset=utf-8;base64,",
    ],
)
def test_a_data_url_is_opened_by_what_it_holds(header):
    assert np.array_equal(pixels(header + PNG_BASE64), noise())


def test_white_space_in_a_data_url_is_ignored():
    wrapped = "\r\n".join(PNG_BASE64[i : i + 76] for i in range(0, len(PNG_BASE64), 76))
    assert np.array_equal(pixels(f"data:image/png;base64, {wrapped}\n"), noise())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("data:image/png;base64", "must read data:image/TYPE;base64,DATA", id="no comma"),
        pytest.param("data:", "must read data:image/TYPE;base64,DATA", id="nothing at all"),
        pytest.param("data:image/png," + PNG_BASE64, "must read data:image/TYPE;base64,DATA", id="not base64"),
        pytest.param("data:image/svg+xml,<svg/>", "must read data:image/TYPE;base64,DATA", id="SVG as text"),
        pytest.param("data:image/png;base64,", "empty", id="empty"),
        pytest.param("data:image/png;base64, \n", "empty", id="white space only"),
        pytest.param("data:image/png;base64,-_-_", "not valid base64", id="URL-safe alphabet"),
        pytest.param("data:image/png;base64,iVBOR", "not valid base64", id="missing padding"),
        pytest.param("data:image/png;base64,iV*ORw==", "not valid base64", id="foreign character"),
        pytest.param("data:image/png;base64,é", "not valid base64", id="not ASCII"),
        pytest.param("data:image/png;base64,\ud800", "not valid base64", id="lone surrogate"),
        pytest.param("data:image/png;base64,AAAA", "not an image", id="not an image"),
        pytest.param(
            "data:image/svg+xml;base64," + base64.b64encode(NOT_IMAGES["svg"]).decode(), "not an image", id="SVG"
        ),
    ],
)
def test_a_malformed_data_url_is_refused(url, reason):
    assert reason in refusal(url)


@pytest.mark.parametrize("prefix", ["", " data:image/png;base64,"], ids=["bare base64", "leading space"])
def test_a_file_pasted_as_text_is_not_repeated_in_the_message(prefix):
    """Such a text is taken for a path; its message must still fit on a screen and into a log."""
    assert len(refusal(prefix + base64.b64encode(noise(300, 300).tobytes()).decode())) < 1000


# --- fuzzing -----------------------------------------------------------------------------------------


def seeds():
    """One small valid file of every kind, with the metadata that decoders parse."""
    picture = Image.fromarray(noise())
    turned = [picture.rotate(90 * i) for i in range(3)]
    tags = exif(
        orientation_tag(6), (X_RESOLUTION, RATIONAL, 1, struct.pack("<II", 72, 1)), (MAKE, ASCII, 6, b"Maker\0")
    )
    return [
        encode(picture, "JPEG", exif=tags),
        encode(picture, "JPEG", progressive=True),
        encode(picture.convert("CMYK"), "JPEG"),
        encode(picture, "MPO", save_all=True, append_images=[picture]),
        encode(picture, "PNG", exif=tags, dpi=(72, 72), icc_profile=bytes(50)),
        encode(picture.quantize(16), "PNG", transparency=3),
        encode(picture.quantize(16), "PNG", transparency=bytes(range(16))),
        encode(picture.convert("1"), "PNG", transparency=0),
        encode(picture.convert("LA"), "PNG"),
        encode(Image.new("I;16", (9, 7), 40000), "PNG"),
        encode(turned[0], "PNG", save_all=True, append_images=turned[1:]),
        encode(turned[0], "GIF", save_all=True, append_images=turned[1:], transparency=1),
        encode(picture, "BMP"),
        encode(picture.quantize(16), "BMP"),
        encode(picture, "WEBP", exif=tags),
        encode(picture.convert("RGBA"), "WEBP", lossless=True),
        encode(turned[0], "WEBP", save_all=True, append_images=turned[1:]),
    ]


SEEDS = seeds()


def mutate(data, mutations):
    """Flip bits, cut and insert: each mutation is (kind, where in the file as a share, bytes)."""
    data = bytearray(data)
    for kind, share, patch in mutations:
        at = int(share * len(data))
        if kind == "overwrite":
            data[at : at + len(patch)] = patch
        elif kind == "flip" and data:
            data[min(at, len(data) - 1)] ^= 1 << patch[0] % 8
        elif kind == "cut":
            del data[at : at + patch[0]]
        elif kind == "insert":
            data[at:at] = patch
        else:
            del data[at:]
    return bytes(data)


def with_valid_checksums(data):
    """A PNG whose chunks carry the right CRC again, so that a mutation gets past the first check."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    fixed, at = data[:8], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunk = data[at + 4 : at + 8 + length]
        fixed += data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + length
    return fixed


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "flip", "flip", "cut", "insert", "end"]),
        # headers are short and decide most: half of the mutations hit the first tenth of the file
        st.one_of(st.floats(0, 0.1), st.floats(0, 1)),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def assert_image_or_media_error(data, reference_image_mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = open_image(data, reference_image_mode)
        except MediaError as error:
            assert "\n" not in str(error)
        else:
            assert image.mode == "RGB"
            assert min(image.size) >= 1


@FUZZ
@given(st.binary(max_size=300), st.booleans())
@example(b"\x89PNG\r\n\x1a\n", False)
@example(b"GIF89a", False)
@example(b"BM", False)
@example(b"RIFF\x04\0\0\0WEBP", False)
@example(b"\xff\xd8\xff", False)
def test_random_bytes_give_an_image_or_a_media_error(data, reference_image_mode):
    assert_image_or_media_error(data, reference_image_mode)


@settings(FUZZ, max_examples=1000)
@given(st.sampled_from(SEEDS), MUTATIONS, st.booleans(), st.booleans())
def test_a_damaged_image_gives_an_image_or_a_media_error(seed, mutations, checksums, reference_image_mode):
    data = mutate(seed, mutations)
    assert_image_or_media_error(with_valid_checksums(data) if checksums else data, reference_image_mode)


@pytest.mark.parametrize("reference_image_mode", [False, True])
@pytest.mark.parametrize("chunks", [(), [(b"tRNS", b"\0")], [(b"PLTE", b"")]], ids=["no palette", "tRNS", "empty"])
def test_a_palette_image_without_a_palette_gives_an_image_or_a_media_error(chunks, reference_image_mode):
    data = png_file(2, 1, color_type=3, rows=b"\0\1\2", chunks=chunks)
    assert_image_or_media_error(data, reference_image_mode)


def test_a_broken_animation_header_gives_no_warning():
    """APNG whose frame count is 0: Pillow says so in a warning, which is nothing to the caller."""
    data = png_file(1, 1, rows=b"\0\x7f", chunks=[(b"acTL", struct.pack(">II", 0, 0))])
    assert pixels(data).tolist() == [[[0x7F] * 3]]


def test_a_broken_multi_picture_header_gives_no_warning():
    picture = Image.fromarray(noise())
    data = encode(picture, "MPO", save_all=True, append_images=[picture])
    data = data.replace(b"MPF\0", b"MPF\0\xff\xff", 1)
    assert open_image(data).size == picture.size


def test_exif_transpose_of_pillow_agrees():
    """Our table of orientations above is Pillow's too: a guard on the tests themselves."""
    for orientation, stored in STORED.items():
        image = Image.open(io.BytesIO(oriented(stored, exif(orientation_tag(orientation)))))
        assert np.array_equal(np.array(ImageOps.exif_transpose(image)), UPRIGHT)


def test_a_transparent_grey_of_16_bits_becomes_white():
    """tRNS names one of the 65536 greys; the others keep their high byte."""
    samples = np.array([[0x1234, 0x8000], [0xFFFF, 0x1234]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(samples).save(buffer, "PNG", transparency=0x1234)
    assert np.asarray(open_image(buffer.getvalue()))[..., 0].tolist() == [[0xFF, 0x80], [0xFF, 0xFF]]


def test_a_32_bit_grey_image_may_hold_either_depth():
    """PIL's mode "I": values up to 255 are 8-bit samples, larger ones 16-bit."""
    assert open_image(Image.new("L", (1, 1), 200).convert("I")).getpixel((0, 0)) == (200, 200, 200)
    assert open_image(Image.new("I", (1, 1), 0x8000)).getpixel((0, 0)) == (0x80, 0x80, 0x80)


def test_a_file_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "at12:30.png")
    monkeypatch.chdir(tmp_path)
    assert open_image("at12:30.png").size == (2, 2)


def test_a_pil_image_has_the_same_pixel_limit():
    with pytest.raises(MediaError, match="image of 20000x10000 pixels is too large"):
        open_image(Image.new("1", (20_000, 10_000)))


def test_threads_that_open_images_leave_warnings_as_they_were():
    """One of them may finish while another is in the middle of a picture that Pillow warns about."""
    before = list(warnings.filters)
    data = oriented(STORED[6], exif(orientation_tag(6), (MAKE, 0, 0, b""), (MAKE, LONG, 13, b"")))
    with ThreadPoolExecutor(4) as pool:
        for image in pool.map(open_image, [data] * 200):
            assert np.array_equal(np.asarray(image), UPRIGHT)
    assert warnings.filters == before


def test_one_picture_object_in_many_threads(tmp_path):
    """It reads its file when it is first used: every thread gets the whole picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for _ in range(5):
        with Image.open(tmp_path / "picture.png") as lazy, ThreadPoolExecutor(4) as pool:
            for image in pool.map(open_image, [lazy] * 8):
                assert np.array_equal(np.asarray(image), pixels)
