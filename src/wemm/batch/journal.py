"""Answers on disk the moment they are given, beside the file they will become: what a kill cannot take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from wemm.errors import StorageError

_HEADER = "wemm_journal"
_VERSION = 1


class Journal:
    """`TARGET.partial`: a line of settings, then a line per answer in the order they came; at the end TARGET.

        with Journal(target, settings, resume, overwrite) as journal:
            for key in keys_not_in(journal.records):
                journal.append(key, record)
            journal.publish(lines)

    A last line that a kill tore is dropped, and what failed is no answer: `resume` asks it again, also after
    TARGET was written. Raises StorageError if TARGET is complete, if it is begun and neither `resume` nor
    `overwrite` is given, if it was begun with other settings, or if another run writes it.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> None:
        self._target = target
        self._partial = _partial(target)
        self.records: dict[str, dict[str, Any]] = {}
        """What is answered, by key."""
        self._lock = FileLock(target.with_name(f"{target.name}.lock"))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(
                f"{target} is being written by another run; wait for it or choose another"
            ) from None
        except OSError as error:
            raise _refused(target, error) from None
        try:
            self._file = self._open(dict(settings), resume, overwrite)
        except BaseException:
            self._unlock()
            raise

    def append(self, key: str, record: Mapping[str, Any]) -> None:
        """One answer, on disk when this returns."""
        self._write({"key": key, **record})
        self.records[key] = dict(record)

    def publish(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write TARGET, whole or not at all; the journal is dropped unless something failed."""
        finished = self._target.with_name(f"{self._target.name}.finished")
        try:
            with finished.open("w", encoding="utf-8") as file:
                file.writelines(f"{_line(line)}\n" for line in lines)
            finished.replace(self._target)
            if not any(_failed(record) for record in self.records.values()):
                self._file.close()
                self._partial.unlink()
        except OSError as error:
            raise _refused(self._target, error) from None

    def close(self) -> None:
        """Leave what is unfinished to a later run."""
        self._file.close()
        self._unlock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> IO[bytes]:
        check_target(self._target, resume, overwrite)
        begun = not overwrite and _is_begun(self._partial)
        try:
            end = self._read(settings) if begun else 0
            file = self._partial.open("r+b" if begun else "w+b")
            file.truncate(end)
            file.seek(end)
        except OSError as error:
            raise _refused(self._partial, error) from None
        self._file = file
        if not end:
            self._write({_HEADER: _VERSION, "settings": settings})
        return file

    def _read(self, settings: dict[str, Any]) -> int:
        """Take over the records; returns how many bytes of the file are whole lines."""
        lines = self._partial.read_bytes().split(b"\n")[:-1]
        if not lines:
            return 0
        entries = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        begun_with = entries[0].get("settings") if entries[0].get(_HEADER) == _VERSION else None
        if not isinstance(begun_with, dict):
            raise StorageError(f"{self._partial} is no journal of this version: --overwrite it")
        self._check_settings(begun_with, json.loads(json.dumps(settings, default=str)))
        for entry in entries[1:]:
            key = str(entry.pop("key"))
            if not _failed(entry):
                self.records[key] = entry
        return sum(len(line) + 1 for line in lines)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and (number == 1 or "key" in entry):
                return entry
        except ValueError:
            pass
        raise StorageError(f"line {number} of {self._partial} is damaged: delete that line, or --overwrite")

    def _check_settings(self, begun_with: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        names = [n for n in {**begun_with, **wanted} if begun_with.get(n) != wanted.get(n)]
        if names:
            changes = ", ".join(f"{n} {begun_with.get(n)!r}, now {wanted.get(n)!r}" for n in names)
            raise StorageError(
                f"{self._target} was begun with other settings ({changes}): use those, or --overwrite it"
            )

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(entry).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise _refused(self._partial, error) from None

    def _unlock(self) -> None:
        # Removed while it is held: who takes it next makes a new one.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def check_target(target: Path, resume: bool, overwrite: bool) -> None:
    """Refuse what `Journal` would refuse for what lies there: before a model is loaded. Raises StorageError."""
    if overwrite:
        return
    begun = _is_begun(_partial(target))
    if not begun and target.exists():
        raise StorageError(f"{target} is there and complete: choose another, or --overwrite it")
    if begun and not resume:
        answers = _partial(target).name
        raise StorageError(
            f"{target} is begun ({answers} has answers): --resume to go on, --overwrite to start again"
        )


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _is_begun(partial: Path) -> bool:
    return partial.exists() and partial.stat().st_size > 0


def _failed(record: Mapping[str, Any]) -> bool:
    return record.get("error") is not None


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, default=str)


def _refused(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path} cannot be written: {error.strerror or error}{_room(path)}")


def _room(path: Path) -> str:
    try:
        status = os.statvfs(path.parent)
    except (OSError, AttributeError):
        return ""
    return "" if status.f_bavail else " (the disk is full)"
