"""Safetensors files of a directory: which tensor lies where, checked before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wemm.checkpoint.json_file import read_json
from wemm.checkpoint.weight_map import canonical_name
from wemm.errors import CheckpointError, ConfigError

INDEX_NAME = "model.safetensors.index.json"
STORED_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""What a file calls the dtypes of weights, and our names."""
QUANTIZED_DTYPES = {"I8": "int8", "U8": "uint8"}
"""The same for the integers of quantised weights."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `name` is its spelling in the file; `key` its renamed spelling."""

    key: str
    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """A `safe_open` handle whose failures name the file. Raises CheckpointError."""
    try:
        shard = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    with shard:
        try:
            yield shard
        except SafetensorError as error:
            raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: not a complete safetensors file ({error}); fetch or convert it again")


def shard_files(directory: Path) -> list[Path]:
    """The files of the index if there is one, else every *.safetensors. Raises CheckpointError."""
    index = directory / INDEX_NAME
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{index}: weight_map must be an object of tensor name → file name")
        names = sorted({str(name) for name in weight_map.values()})
    else:
        names = sorted(path.name for path in directory.glob("*.safetensors"))
    return [_confined(directory, name) for name in names]


def _confined(directory: Path, name: str) -> Path:
    path = directory / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise CheckpointError(f"{directory / INDEX_NAME}: shard name {name!r} must be a plain file name")
    if not os.path.isfile(path):  # noqa: PTH113 - False for a name no file can have
        raise CheckpointError(f"{path}: shard is missing; fetch the checkpoint again")
    # The hub's cache links snapshots/<revision>/<file> to blobs/<hash> of the same repository.
    allowed = (directory.resolve(), (directory.resolve() / "../../blobs").resolve())
    if path.resolve().parent not in allowed:
        raise CheckpointError(f"{path}: links outside the checkpoint directory; copy the file into it")
    return path


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory by renamed name, from the file headers alone. Raises CheckpointError."""
    found: dict[str, StoredTensor] = {}
    for path in shard_files(directory):
        with open_shard(path) as shard:
            for name in shard.keys():  # noqa: SIM118 - a handle, not a mapping
                entry = shard.get_slice(name)
                tensor = StoredTensor(
                    canonical_name(name), name, path, entry.get_dtype(), tuple(entry.get_shape())
                )
                if tensor.key in found:
                    raise CheckpointError(
                        f"{tensor.key} is stored twice: in {found[tensor.key].file.name} and {path.name}"
                    )
                if tensor.dtype not in (*STORED_DTYPES, *QUANTIZED_DTYPES):
                    raise CheckpointError(
                        f"{path}: {name} has dtype {tensor.dtype}; {', '.join(STORED_DTYPES)} can be loaded"
                    )
                found[tensor.key] = tensor
    return found
