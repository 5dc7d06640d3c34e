"""Bytes, path, data URL or PIL image → an RGB image, with limits checked before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from wemm.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_IMAGE_BYTES = 100 * 2**20
MAX_IMAGE_PIXELS = 100_000_000
"""The original's own limits: 100 MB of file, 10000 x 10000 pixels."""

_DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
    EOFError,
    IndexError,
    MemoryError,
)


def open_image(source: Any, reference_image_mode: bool = False) -> Image.Image:
    """An image as the model sees it before resizing: mode RGB, upright, first frame.

    `source` is a path, bytes, a `data:` URL or a PIL image. EXIF orientation is applied and
    transparency composited on white, unless `reference_image_mode` asks for the original's
    behaviour (both ignored, 16-bit samples clipped). Raises MediaError.
    """
    image = source if isinstance(source, Image.Image) else _decode(_read(source))
    if image.width < 1 or image.height < 1:
        raise MediaError(f"image has no pixels: {image.width}x{image.height}")
    try:
        return image.convert("RGB") if reference_image_mode else _to_rgb(_upright(image))
    except _DECODE_ERRORS as error:
        raise MediaError(f"image cannot be converted to RGB: {error}") from None


def _read(source: Any) -> bytes:
    if isinstance(source, Path):
        return _read_file(source)
    if isinstance(source, str):
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):", source)
        if scheme is None:
            return _read_file(Path(source))
        if scheme[1].lower() == "data":
            return _read_data_url(source)
        raise MediaError(f"{scheme[1]}: URLs are not fetched; give a path, bytes or a data: URL")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _checked(bytes(source), "image")
    raise MediaError(f"an image is a path, bytes, a data: URL or a PIL image. Given: {type(source).__name__}")


def _read_file(path: Path) -> bytes:
    try:
        status = path.expanduser().stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{str(path)!r} is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise MediaError(f"{str(path)!r} has {status.st_size} bytes; at most {MAX_IMAGE_BYTES} are read")
        return _checked(path.expanduser().read_bytes(), repr(str(path)))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{str(path)!r} cannot be read: {reason}") from None


def _read_data_url(url: str) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError("a data: URL must read data:image/TYPE;base64,DATA")
    if len(payload) * 3 // 4 > MAX_IMAGE_BYTES:
        raise MediaError(f"data: URL of {len(payload)} characters; at most {MAX_IMAGE_BYTES} bytes are read")
    try:
        return _checked(base64.b64decode("".join(payload.split()), validate=True), "data: URL")
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"data: URL is not valid base64: {error}") from None


def _checked(data: bytes, name: str) -> bytes:
    if not data:
        raise MediaError(f"{name} is empty: 0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise MediaError(f"{name} has {len(data)} bytes; at most {MAX_IMAGE_BYTES} are read")
    return data


def _decode(data: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 million pixels on; the limit here is our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(pixels[0] if pixels else "too many") from None
    except UnidentifiedImageError:
        raise MediaError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except _DECODE_ERRORS as error:
        raise MediaError(f"image header is damaged: {error}") from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise _too_large(f"{image.width}x{image.height}")
    try:
        image.load()
    except _DECODE_ERRORS as error:
        raise MediaError(f"{image.format} image is damaged or truncated: {error}") from None
    return image


def _too_large(pixels: str) -> MediaError:
    return MediaError(f"image of {pixels} pixels is too large; at most {MAX_IMAGE_PIXELS} pixels, scale it down")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODE_ERRORS, TypeError, KeyError, ZeroDivisionError):
        return image  # orientation that cannot be read is no orientation


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: the high byte, as Pillow itself does for 16-bit colour.
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
