"""Are the files the ones that were published: by SHA256SUMS, the hub's client, or their own words."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from wemm.checkpoint.checkpoint import list_names
from wemm.checkpoint.convert import DIGEST_KEY
from wemm.checkpoint.shards import open_shard
from wemm.doctor.check import FAIL, OK, WARN, Check
from wemm.errors import CheckpointError, StorageError
from wemm.progress import Advance, ProgressBar

SUMS_NAME = "SHA256SUMS"
_HUB_RECORDS = Path(".cache/huggingface/download")
_CHUNK = 2**22


def record_hashes(directory: Path, progress: ProgressBar) -> int:
    """Write SHA256SUMS, as `sha256sum -c` reads it. Returns the number of files. Raises StorageError."""
    paths = _checkpoint_files(directory)
    with progress("hashing", sum(path.stat().st_size for path in paths), "bytes") as advance:
        lines = [f"{_file_digest(path, hashlib.sha256(), advance)}  {path.name}\n" for path in paths]
    target, partial = directory / SUMS_NAME, directory / f".{SUMS_NAME}.partial"
    try:
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from None
    return len(paths)


def check_files(directory: Path, progress: ProgressBar) -> Check:
    """Every file whose hash is known somewhere, read and hashed."""
    recorded = _recorded(directory)
    broken = [line for line in recorded.malformed if line]
    paths = [directory / name for name in recorded.hashes]
    missing = [path.name for path in paths if not path.is_file()]
    present = [path for path in paths if path.is_file()]
    own = {path: digest for path in _unrecorded(directory, recorded) if (digest := _own_digest(path))}
    with progress("hashing files", sum(path.stat().st_size for path in (*present, *own)), "bytes") as advance:
        differing = [path.name for path in present if not _matches(path, recorded.hashes[path.name], advance)]
        differing += [path.name for path, digest in own.items() if _tensors_digest(path, advance) != digest]
    edited = [name for name in differing if recorded.by_hub and name.endswith(".json")]
    damaged = [name for name in differing if name not in edited]
    unrecorded = [path.name for path in _unrecorded(directory, recorded) if path not in own]
    source = recorded.source or ("the files themselves" if own else None)
    figures = {
        "source": source, "checked": len(present) + len(own), "differing": differing, "missing": missing,
        "unrecorded": unrecorded,
    }  # fmt: skip
    if damaged or missing:
        wrong = list_names(sorted(damaged + missing))
        verb = "differs from" if damaged else "is missing, but stands in"
        return Check(
            "files", FAIL, f"{wrong}: {verb} what is recorded by {source}",
            f"{wrong} is not the file that was published (damaged, cut short, or edited): fetch it again",
            figures,
        )  # fmt: skip
    if broken:
        return Check(
            "files", FAIL, f"{SUMS_NAME}: line {broken[0]!r:.80} is not `HASH  NAME`",
            f"{SUMS_NAME} cannot be read: delete it, or write it anew by --record-hashes", figures,
        )  # fmt: skip
    if edited:
        return Check("files", WARN, f"{list_names(edited)} edited since the download", figures=figures)
    if source is None:
        return Check(
            "files", OK, "hashes not recorded: --record-hashes writes them down for next time", figures=figures
        )
    rest = f"; not recorded: {list_names(unrecorded)}" if unrecorded else ""
    return Check(
        "files", OK, f"{len(present) + len(own)} files have the hashes of {source}{rest}", figures=figures
    )


def sha256(path: Path) -> str:
    """Of a whole file, in hexadecimal."""
    return _file_digest(path, hashlib.sha256(), lambda num_bytes: None)


class _Recorded:
    """What is known about a directory: file name → hash, and who says so."""

    def __init__(self, hashes: dict[str, str], source: str | None, malformed: list[str], by_hub: bool) -> None:
        self.hashes = hashes
        self.source = source
        self.malformed = malformed
        self.by_hub = by_hub


def _recorded(directory: Path) -> _Recorded:
    sums = directory / SUMS_NAME
    if sums.is_file():
        return _read_sums(sums)
    hashes = dict(_hub_hashes(directory))
    return _Recorded(hashes, "the hub's download" if hashes else None, [], by_hub=True)


def _read_sums(path: Path) -> _Recorded:
    hashes, malformed = {}, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *]([^/\\]+)", line)
        if match and match[2] not in (".", ".."):
            hashes[match[2]] = match[1].lower()
        else:
            malformed.append(line)
    return _Recorded(hashes, SUMS_NAME, malformed, by_hub=False)


def _hub_hashes(directory: Path) -> Iterator[tuple[str, str]]:
    """From the cache (a link to blobs/HASH) or beside a download to a directory (second line: the ETag).

    64 digits are the SHA-256 of a large file, 40 the git hash of a small one.
    """
    for path in _checkpoint_files(directory):
        record = directory / _HUB_RECORDS / f"{path.name}.metadata"
        known = ""
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            known = path.resolve().name
        elif record.is_file():
            known = [*record.read_text(encoding="utf-8", errors="replace").splitlines(), "", ""][1].strip('" ')
        if re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", known):
            yield path.name, known


def _unrecorded(directory: Path, recorded: _Recorded) -> list[Path]:
    return [path for path in _checkpoint_files(directory) if path.name not in recorded.hashes]


def _own_digest(path: Path) -> str | None:
    """What a file that was converted or quantised says of its tensors."""
    if path.suffix != ".safetensors":
        return None
    try:
        with open_shard(path) as shard:
            return (shard.metadata() or {}).get(DIGEST_KEY)
    except CheckpointError:  # another check says so
        return None


def _tensors_digest(path: Path, advance: Advance) -> str:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        return _digest(file, hashlib.sha256(), advance)


def _matches(path: Path, expected: str, advance: Advance) -> bool:
    if len(expected) == 64:
        return _file_digest(path, hashlib.sha256(), advance) == expected
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return _file_digest(path, blob, advance) == expected


def _file_digest(path: Path, digest: hashlib._Hash, advance: Advance) -> str:
    with path.open("rb") as file:
        return _digest(file, digest, advance)


def _digest(file: BinaryIO, digest: hashlib._Hash, advance: Advance) -> str:
    """Of the rest of a file."""
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest()


def _checkpoint_files(directory: Path) -> list[Path]:
    names = sorted(os.listdir(directory))  # noqa: PTH208 - names are wanted
    wanted = [name for name in names if name.endswith((".safetensors", ".json")) or name == "tokenizer.model"]
    return [directory / name for name in wanted if (directory / name).is_file()]
