"""Where the images of a request come from: data: URLs, hosts and files that the operator allowed.

What leaves here are bytes; they are decoded elsewhere, in a process that can do no harm.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from wemm.errors import MediaError, PromptError
from wemm.processing.media import read_data_url
from wemm.server.fetch import Fetcher

_UNREADABLE = "the file is not there, or not under --allowed-local-media-path"


class MediaLoader:
    """Turns messages of strangers into messages whose images are bytes."""

    def __init__(self, fetcher: Fetcher, local_root: Path | None, max_images: int, max_bytes: int) -> None:
        self._fetcher = fetcher
        self._root = local_root.resolve() if local_root is not None else None
        self._max_images = max_images
        self._max_bytes = max_bytes

    async def load(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The same messages with every `image_url` part replaced by its bytes. Raises MediaError, PromptError.

        Parts of other types are left to the chat template, except `image`: what it holds would be opened.
        """
        return [await self._load_message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def count(self, messages: Sequence[Mapping[str, Any]]) -> int:
        """Images of the messages. Raises MediaError if there are more than one request may have."""
        contents = [message.get("content") for message in messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        images = sum(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)
        if images > self._max_images:
            raise MediaError(f"the request has {images} images; at most {self._max_images}", "messages")
        return images

    async def _load_message(self, message: Mapping[str, Any], param: str) -> Mapping[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = [await self._load_part(part, f"{param}.content[{j}]") for j, part in enumerate(content)]
        return {**message, "content": parts}

    async def _load_part(self, part: Any, param: str) -> Any:
        if not isinstance(part, Mapping) or part.get("type") == "text":
            return part
        if part.get("type") != "image_url":
            raise PromptError(
                f"{param}.type must be text or image_url. Given: {str(part.get('type'))[:100]!r}", f"{param}.type"
            )
        holder = part.get("image_url")
        url = holder.get("url") if isinstance(holder, Mapping) else holder
        param = f"{param}.image_url"
        if not isinstance(url, str) or not url:
            raise PromptError(f"{param} must hold a URL", param)
        try:
            data = await self._read(url)
        except MediaError as error:
            raise MediaError(f"{param}: {error}", param) from None
        detail = holder.get("detail") if isinstance(holder, Mapping) else None
        return {"type": "image_url", "image_url": {"url": data, "detail": detail}}

    async def _read(self, url: str) -> bytes:
        scheme = url[:5].lower()
        if scheme == "data:":
            data = await asyncio.to_thread(read_data_url, url, self._max_bytes)
        elif scheme == "file:":
            data = await asyncio.to_thread(self._read_file, url)
        else:
            data = await self._fetcher.fetch(url)
        return data

    def _read_file(self, url: str) -> bytes:
        """A regular file below the root; the same error whether it is absent or forbidden."""
        if self._root is None:
            raise MediaError(
                "file: URLs are not read here; send a data: URL, or start the service with "
                "--allowed-local-media-path DIRECTORY"
            )
        parts = urlsplit(url)
        path = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or "\0" in str(path):
            raise MediaError(_UNREADABLE)
        try:
            descriptor = _open_below(self._root, Path(os.path.realpath(path)).relative_to(self._root).parts)
        except (OSError, ValueError):
            raise MediaError(_UNREADABLE) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise MediaError(_UNREADABLE)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(self._max_bytes + 1)
        if len(data) > self._max_bytes:
            raise MediaError(f"the file has more than {self._max_bytes} bytes, the limit of --max-image-size")
        return data


def _open_below(root: Path, names: Sequence[str]) -> int:
    """Step by step and through no link: one may have been put there since. Raises OSError."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for i, name in enumerate(names, 1):
        kind = os.O_DIRECTORY if i < len(names) else os.O_NONBLOCK  # which never waits for a pipe
        try:
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | kind, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor
