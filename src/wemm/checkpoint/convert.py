"""Hub checkpoint → renamed checkpoint: one spelling, one dtype, quantised if asked, every side file written.

Tensor by tensor, so memory stays below one shard. The result appears under its final name complete
or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from wemm.checkpoint.adapter import ADAPTER_CONFIG_NAME, ADAPTER_ID, ADAPTER_MAP_NAME
from wemm.checkpoint.checkpoint import CALIBRATION_KEY, Checkpoint, open_checkpoint
from wemm.checkpoint.config_file import quantization_section
from wemm.checkpoint.json_file import read_json
from wemm.checkpoint.shards import (
    INDEX_NAME,
    QUANTIZED_DTYPES,
    STORED_DTYPES,
    StoredTensor,
    open_shard,
    stored_tensors,
)
from wemm.checkpoint.weight_map import TensorSpec, expected_tensors, plora_linears
from wemm.config import DTYPES, UNQUANTIZED, PloraConfig, QuantizationConfig
from wemm.errors import ParameterError, StorageError
from wemm.progress import Advance, ProgressBar, silent

_STORED = {getattr(torch, name): stored for stored, name in {**STORED_DTYPES, **QUANTIZED_DTYPES}.items()}
DIGEST_KEY = "sha256"
"""In a written file's metadata: of its tensors, which is all behind the header."""
_WRITTEN_HERE = (INDEX_NAME, "config.json", ADAPTER_CONFIG_NAME, ADAPTER_MAP_NAME)
_SIDE_FILES = ("*.json", "tokenizer.model", "LICENSE*", "README*")
_HEADER_ROOM = 2**20


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    directory: Path
    num_tensors: int
    num_bytes: int
    num_shards: int
    calibration: str | None
    """How int4 was calibrated."""


@dataclass(frozen=True)
class Calibrated:
    """Weights that were quantised for the inputs they meet."""

    method: str
    num_samples: int
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    """By name: integers and scale."""

    def __str__(self) -> str:
        return f"{self.method}, {self.num_samples} samples"


Calibrate = Callable[[Checkpoint], Calibrated]


@dataclass(frozen=True)
class _NewTensor:
    """One tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Form:
    """What the tensors of a checkpoint become."""

    checkpoint: Checkpoint
    dtype: str
    """Of all that is not quantised."""
    quantization: QuantizationConfig
    calibrated: Calibrated | None = None

    @property
    def calibration(self) -> str | None:
        """How int4 was calibrated, now or before."""
        return str(self.calibrated) if self.calibrated else self.checkpoint.calibration

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the result."""
        return expected_tensors(self.checkpoint.config, self.checkpoint.plora, self.quantization)

    def of(self, tensor: StoredTensor) -> list[_NewTensor]:
        """What is written for one tensor of the source: itself, or integers and their scale."""
        spec = self.specs[tensor.key]
        specs = [spec, self.specs[spec.scale_name]] if self._quantizes(spec) else [spec]
        return [_NewTensor(s.name, self._dtype(s), s.stored_shape) for s in specs]

    def values(self, tensor: StoredTensor, value: torch.Tensor) -> Sequence[torch.Tensor]:
        """Their numbers, in the same order."""
        spec = self.specs[tensor.key]
        if self.calibrated is not None and spec.name in self.calibrated.weights:
            return self.calibrated.weights[spec.name]
        if spec.scheme is not None and self._quantizes(spec):
            return spec.scheme.quantize(value)
        return [value.to(self._dtype(spec))]

    def _quantizes(self, spec: TensorSpec) -> bool:
        return spec.scheme is not None and self.checkpoint.specs[spec.name].scheme is None

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        dtype: torch.dtype = spec.own_dtype or getattr(torch, self.dtype)
        return dtype


def convert(
    source: Path,
    target: Path,
    dtype: str | None = None,
    force: bool = False,
    progress: ProgressBar = silent,
    quantization: QuantizationConfig = UNQUANTIZED,
    calibrate: Calibrate | None = None,
) -> Converted:
    """Write `source` to `target` with renamed tensors in `dtype` (default: the source's own).

    Weights that `quantization` names are quantised, by `calibrate` where it does; those that already are stay as
    they are.
    Raises CheckpointError if the source is not complete, StorageError if the target exists (unless
    `force`), the disk is too small or refuses.
    """
    if dtype not in (None, *DTYPES):
        raise ParameterError(f"dtype must be {', '.join(DTYPES)}. Given: {dtype!r}")
    checkpoint = open_checkpoint(source)
    form = _Form(checkpoint, dtype or checkpoint.dtype, quantization.over(checkpoint.config.quantization))
    if calibrate is not None:
        _check_calibration(checkpoint, quantization)
    target = Path(os.path.expanduser(target)).absolute()  # noqa: PTH111 - leaves an unknown ~user alone
    _check_target(checkpoint, target, force)
    with _storage_errors(target), _new_directory(target, force) as partial:
        shards = _plan_shards(checkpoint)
        new = {name: [new for t in tensors for new in form.of(t)] for name, tensors in shards.items()}
        total = sum(tensor.num_bytes for tensors in new.values() for tensor in tensors)
        _check_free_space(checkpoint, total, partial)
        if calibrate is not None:
            form = replace(form, calibrated=calibrate(checkpoint))
        with progress("quantising" if quantization else "converting", total, "bytes") as advance:
            for name, tensors in shards.items():
                _write_shard(partial / name, tensors, form, advance)
        _write_json(partial / INDEX_NAME, {
            "metadata": {"total_size": total},
            "weight_map": {t.name: name for name, tensors in sorted(new.items()) for t in tensors},
        })  # fmt: skip
        _write_side_files(form, partial, target)
        _verify(partial, form)
    return Converted(target, len(form.specs), total, len(shards), form.calibration)


def _check_calibration(checkpoint: Checkpoint, quantization: QuantizationConfig) -> None:
    if quantization.language != "int4":
        raise ParameterError(f"only int4 is calibrated: give --scheme int4. Given: {quantization.language!r}")
    stored = checkpoint.config.quantization.language
    if stored is not None:
        raise ParameterError(
            f"{checkpoint.directory} is already quantised to {stored}: calibrate the float checkpoint"
        )


def _check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    if target.exists() and target.samefile(checkpoint.directory):
        raise StorageError(f"{target} is the source itself; give another directory")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise StorageError(f"{target} exists and is not a directory; give another name")
    if target.exists() and not force:
        raise StorageError(f"{target} exists; give another directory, or --force to replace it")
    if force and target.exists() and not (target / "config.json").exists() and any(target.iterdir()):
        raise StorageError(f"{target} holds something else than a checkpoint; it is not replaced even by --force")


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # a name no file can have
        raise StorageError(f"cannot write {str(target)!r}: {error}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "the disk is full"
        else:
            reason = error.strerror or str(error)
        raise StorageError(f"cannot write {target}: {reason}; nothing was left under that name") from None


@contextmanager
def _new_directory(target: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling that takes the final name only if the body succeeds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        partial.chmod(0o755)
        yield partial
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if force and target.exists():
            _replace(target, partial)
        else:
            partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _replace(target: Path, partial: Path) -> None:
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    target.rename(replaced)
    try:
        partial.rename(target)
    except OSError:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_free_space(checkpoint: Checkpoint, num_bytes: int, directory: Path) -> None:
    needed = num_bytes + _HEADER_ROOM
    needed += sum(path.stat().st_size for path in _side_files(checkpoint.directory))
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StorageError(
            f"{directory.parent}: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; "
            "free some space or choose another disk"
        )


def _plan_shards(checkpoint: Checkpoint) -> dict[str, list[StoredTensor]]:
    """Tensors grouped as they lie in the source; the low-rank factors of an adapter directory come last."""
    files = sorted(
        {t.file for t in checkpoint.tensors.values()}, key=lambda f: (f.parent != checkpoint.directory, f)
    )
    names = {file: f"model-{i:05d}-of-{len(files):05d}.safetensors" for i, file in enumerate(files, start=1)}
    shards: dict[str, list[StoredTensor]] = {names[file]: [] for file in files}
    for tensor in checkpoint.tensors.values():
        shards[names[tensor.file]].append(tensor)
    return shards


def _write_shard(path: Path, tensors: list[StoredTensor], form: _Form, advance: Advance) -> None:
    # safetensors' own save_file wants the whole shard in memory; the format is a length, a JSON
    # header and the data, so it is written here and read back by the library in _verify.
    metadata = {"format": "pt", DIGEST_KEY: "0" * 64}
    if form.quantization:
        metadata["quantization"] = str(form.quantization)
    if form.calibration:
        metadata[CALIBRATION_KEY] = form.calibration
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for new in (new for tensor in tensors for new in form.of(tensor)):
        end = offset + new.num_bytes
        header[new.name] = {
            "dtype": _STORED[new.dtype],
            "shape": list(new.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    digest = hashlib.sha256()
    with path.open("wb") as out, open_shard(tensors[0].file) as shard:
        out.write(_encoded(header))
        for tensor in tensors:
            for value in form.values(tensor, shard.get_tensor(tensor.name)):
                data = value.contiguous().view(-1).view(torch.uint8).numpy().data
                digest.update(data)
                out.write(data)
                advance(data.nbytes)
        metadata[DIGEST_KEY] = digest.hexdigest()  # as long as what stands there
        out.seek(0)
        out.write(_encoded(header))


def _encoded(header: Mapping[str, object]) -> bytes:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_side_files(form: _Form, partial: Path, target: Path) -> None:
    checkpoint, dtype = form.checkpoint, form.dtype
    for path in _side_files(checkpoint.directory):
        shutil.copyfile(path, partial / path.name)
    config = read_json(checkpoint.directory / "config.json")
    config |= {"model_type": "wemm", "torch_dtype": dtype, "tokenizer_path": str(target)}
    config["text_config"] = {**config["text_config"], "torch_dtype": dtype}
    if form.quantization:
        config["quantization_config"] = quantization_section(form.quantization)
    config.pop("auto_map", None)  # names code files of the hub that are not copied and never run
    _write_json(partial / "config.json", config)
    assert checkpoint.plora is not None  # opened with PLoRA
    _write_json(partial / ADAPTER_CONFIG_NAME, _adapter_config(checkpoint, checkpoint.plora))
    _write_json(partial / ADAPTER_MAP_NAME, {ADAPTER_ID: str(target)})


def _adapter_config(checkpoint: Checkpoint, plora: PloraConfig) -> Mapping[str, object]:
    return {
        "peft_type": "LORA",
        "r": plora.r,
        "lora_alpha": int(plora.alpha) if plora.alpha == int(plora.alpha) else plora.alpha,
        "use_rslora": plora.use_rslora,
        "rank_pattern": dict(plora.rank_pattern),
        "alpha_pattern": dict(plora.alpha_pattern),
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in plora_linears(checkpoint.config)}),
    }


def _side_files(directory: Path) -> list[Path]:
    found = {path for pattern in _SIDE_FILES for path in directory.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _WRITTEN_HERE)


def _verify(directory: Path, form: _Form) -> None:
    """Read the result's headers back: complete, and every tensor in the dtype asked for."""
    stored = stored_tensors(directory)
    for new in (new for tensor in form.checkpoint.tensors.values() for new in form.of(tensor)):
        name, tensor = new.name, stored.get(new.name)
        if tensor is None or tensor.shape != new.shape or tensor.dtype != _STORED[new.dtype]:
            raise StorageError(f"{directory}: {name} was not written as it should be; check the disk")


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
