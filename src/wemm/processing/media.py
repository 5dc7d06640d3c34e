"""Bytes, path, data URL or PIL image → an RGB image, with limits checked before anything is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from wemm.errors import MediaError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_IMAGE_BYTES = 100 * 2**20
MAX_IMAGE_PIXELS = 100_000_000
"""The original's own limits: 100 MB of file, 10000 x 10000 pixels."""

_NAME_LEN = 120
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the picture upright."""
_LOADING = threading.Lock()
"""The caller's own image objects read their files when first used, which two threads must not do at once."""


class _Quiet:
    """Pillow warns about much that is harmless here: sizes within our own limit, damaged EXIF.

    Filters of warnings belong to the whole process: the first of several threads that open images changes them,
    the last one changes them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_threads = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_threads:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._num_threads += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._num_threads -= 1
            if not self._num_threads:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()


def open_image(
    source: Any, reference_image_mode: bool = False, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """An image as the model sees it before resizing: mode RGB, upright, first frame.

    `source` is a path, bytes, a `data:` URL or a PIL image of at most `max_image_pixels`. EXIF
    orientation is applied and transparency composited on white, unless `reference_image_mode`
    asks for the original's behaviour (both ignored, 16-bit samples clipped). Raises MediaError.
    """
    with _QUIET:
        if isinstance(source, Image.Image):
            with _LOADING:
                return _convert(source, reference_image_mode, max_image_pixels)
        image = _decode(*_read(source), max_image_pixels)
        return _convert(image, reference_image_mode, max_image_pixels)


def _convert(image: Image.Image, reference_image_mode: bool, max_image_pixels: int) -> Image.Image:
    _check_size("image", image, max_image_pixels)
    with _decoding("image cannot be converted to RGB"):
        return image.convert("RGB") if reference_image_mode else _to_rgb(_upright(image))


def image_file(path: Path) -> tuple[bytes, str]:
    """A file as it is, to be sent on, and its format ("PNG"); nothing is decoded. Raises MediaError."""
    data, name = _read_file(path)
    with _QUIET, _opened(data, name, MAX_IMAGE_PIXELS) as image:
        return data, str(image.format)


@contextmanager
def _decoding(problem: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except Exception as error:  # noqa: BLE001 - on hostile bytes a decoder fails in any way it likes
        raise MediaError(f"{problem}: {str(error) or type(error).__name__}") from None


def _read(source: Any) -> tuple[bytes, str]:
    """Bytes, and how to call them in an error."""
    if isinstance(source, Path):
        return _read_file(source)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return read_data_url(source), "data: URL"
        scheme = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]+):/", source)
        if scheme is not None:
            raise MediaError(f"{scheme[1]}: URLs are not fetched; give a path, bytes or a data: URL")
        return _read_file(Path(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _checked(bytes(source), "image"), "image"
    raise MediaError(f"an image is a path, bytes, a data: URL or a PIL image. Given: {type(source).__name__}")


def _read_file(path: Path) -> tuple[bytes, str]:
    text = str(path)
    name = repr(text if len(text) <= _NAME_LEN else f"{text[:_NAME_LEN]}…")
    try:
        path = path.expanduser()
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise MediaError(f"{name} has {status.st_size} bytes; at most {MAX_IMAGE_BYTES} are read")
        with path.open("rb") as file:
            # Bounded also where the size is a lie, as in /proc.
            return _checked(file.read(MAX_IMAGE_BYTES + 1), name), name
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"{name} cannot be read: {reason}") from None


def read_data_url(url: str, max_bytes: int | None = None) -> bytes:
    """Bytes of a base64 `data:` URL, whatever type it claims; at most MAX_IMAGE_BYTES. Raises MediaError."""
    max_bytes = MAX_IMAGE_BYTES if max_bytes is None else max_bytes
    header, comma, payload = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError("a data: URL must read data:image/TYPE;base64,DATA")
    if len(payload) * 3 // 4 > max_bytes:
        raise MediaError(f"data: URL of {len(payload)} characters; at most {max_bytes} bytes are read")
    try:
        return _checked(base64.b64decode("".join(payload.split()), validate=True), "data: URL")
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"data: URL is not valid base64: {error}") from None


def _checked(data: bytes, name: str) -> bytes:
    if not data:
        raise MediaError(f"{name} is empty: 0 bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise MediaError(f"{name} has {len(data)} bytes or more; at most {MAX_IMAGE_BYTES} are read")
    return data


def _decode(data: bytes, name: str, max_image_pixels: int) -> Image.Image:
    image = _opened(data, name, max_image_pixels)
    with _decoding(f"{name}: {image.format} image is damaged or truncated"):
        image.load()
    return image


def _opened(data: bytes, name: str, max_image_pixels: int) -> ImageFile.ImageFile:
    """The header, read and checked."""
    with _decoding(f"{name} has a damaged image header"):
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(name, pixels[0] if pixels else "too many", max_image_pixels) from None
        except UnidentifiedImageError:
            raise MediaError(f"{name} is not an image in one of the formats {', '.join(FORMATS)}") from None
    _check_size(name, image, max_image_pixels)
    return image


def _check_size(name: str, image: Image.Image, max_image_pixels: int) -> None:
    if image.width < 1 or image.height < 1:
        raise MediaError(f"{name} has no pixels: {image.width}x{image.height}")
    if image.width * image.height > max_image_pixels:
        raise _too_large(name, f"{image.width}x{image.height}", max_image_pixels)


def _too_large(name: str, pixels: str, max_image_pixels: int) -> MediaError:
    return MediaError(f"{name}: image of {pixels} pixels is too large; at most {max_image_pixels}, scale it down")


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the other tags back, and fails where one of them is odd.
    try:
        method = _UPRIGHT.get(int(image.getexif().get(_ORIENTATION_TAG, 1)))
    except Exception:  # noqa: BLE001 - an orientation that cannot be read, for whatever reason, is none
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    samples = np.asarray(image).astype(np.int64).clip(0, 0xFFFF)
    # 16-bit grey: the high byte, as Pillow itself does for 16-bit colour. Mode "I" may hold either depth.
    is_16_bit = image.mode != "I" or samples.max() > 0xFF
    grey = (samples >> 8 if is_16_bit else samples).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[samples == transparent] = 0xFF
    return Image.fromarray(grey).convert("RGB")
