"""A checkpoint directory, opened and checked completely, with no weight read yet."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from wemm.checkpoint.adapter import Adapter, find_adapter
from wemm.checkpoint.config_file import parse_config
from wemm.checkpoint.json_file import read_json
from wemm.checkpoint.shards import (
    QUANTIZED_DTYPES,
    STORED_DTYPES,
    StoredTensor,
    open_shard,
    stored_tensors,
)
from wemm.checkpoint.weight_map import TensorSpec, expected_tensors, is_plora
from wemm.config import PRESETS, ModelConfig, PloraConfig
from wemm.errors import CheckpointError, ConfigError, ModelNotFoundError, ParameterError
from wemm.request import SamplingParams

BUNDLED_DIRECTORY = Path(__file__).parent.parent / "bundled"
CALIBRATION_KEY = "calibration"
"""In the metadata of a file: how its weights of int4 were calibrated."""
_HUB_PATTERNS = ["*.safetensors", "*.json", "tokenizer.model"]
_NAMES_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """A directory that holds exactly the tensors its configuration asks for."""

    directory: Path
    config: ModelConfig
    adapter: Adapter | None
    """None when PLoRA was turned off."""
    tensors: Mapping[str, StoredTensor]
    """Every tensor to load, by renamed name; PLoRA from the adapter that won."""
    specs: Mapping[str, TensorSpec]

    @property
    def plora(self) -> PloraConfig | None:
        """Rank and scaling in force."""
        return self.adapter.plora if self.adapter else None

    @property
    def dtype(self) -> str:
        """What config.json declares, else what most of the tensors are stored in."""
        stored = [tensor.dtype for tensor in self.tensors.values() if tensor.dtype in STORED_DTYPES]
        return self.config.dtype or STORED_DTYPES[max(set(stored), key=stored.count)]

    @property
    def calibration(self) -> str | None:
        """How its int4 was calibrated, as its files say; None: it was not."""
        file = next(tensor.file for tensor in self.tensors.values())
        with open_shard(file) as shard:
            return (shard.metadata() or {}).get(CALIBRATION_KEY)

    def read(self, name: str) -> torch.Tensor:
        """One tensor in float32, whichever way it is stored. Raises CheckpointError."""
        spec = self.specs[name]
        value = self._stored(name)
        if spec.scheme is None or spec.is_scale:
            return value.to(torch.float32)
        return spec.scheme.dequantize(value, self._stored(spec.scale_name), spec.shape[1])

    def _stored(self, name: str) -> torch.Tensor:
        stored = self.tensors[name]
        with open_shard(stored.file) as shard:
            value: torch.Tensor = shard.get_tensor(stored.name)
        return value

    def tensors_by_file(self, part: str = "") -> Mapping[Path, list[StoredTensor]]:
        """Those of a submodule of our model, in the order in which reading them opens every file once."""
        by_file: dict[Path, list[StoredTensor]] = defaultdict(list)
        for tensor in self.tensors.values():
            if self.specs[tensor.key].parameter.startswith(f"{part}." if part else ""):
                by_file[tensor.file].append(tensor)
        return by_file


def is_preset(model: str) -> bool:
    """True if the name is an architecture without files (and no directory of that name lies here)."""
    return model in PRESETS and not Path(model).exists()


def locate(model: str) -> Path:
    """Checkpoint directory of a path, a bundled name or a hub id. Raises ModelNotFoundError."""
    bundled = sorted(p.name for p in BUNDLED_DIRECTORY.iterdir() if p.is_dir())
    # os.path, unlike Path, leaves an unknown ~user alone and answers False for a name no file can have.
    path = Path(os.path.expanduser(model))  # noqa: PTH111
    if model and os.path.isdir(path):  # noqa: PTH112
        return path
    if model in bundled:
        return BUNDLED_DIRECTORY / model
    if model and os.path.exists(path):  # noqa: PTH110
        raise ModelNotFoundError(f"{model!r} is a file; give the directory that holds config.json")
    is_hub_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not model.endswith("/")
    if not is_hub_id:
        raise ModelNotFoundError(
            f"no model {model!r}: not a directory, nor one of the bundled names ({', '.join(bundled)}), "
            "nor a hub id (owner/name)"
        )
    return _download(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS))
    except Exception as error:  # noqa: BLE001 - the hub client raises a dozen kinds; all mean "not fetched"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{model!r} is not a directory here and could not be fetched from the hub: {reason}"
        ) from None


def read_config(directory: Path) -> ModelConfig:
    """config.json of a directory. Raises ConfigError, ModelNotFoundError."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(f"{directory} has no config.json: not a checkpoint directory")
    return parse_config(read_json(path), str(path))


def default_sampling_params(directory: Path) -> SamplingParams:
    """What generation_config.json asks for; greedy where it says nothing. Raises ConfigError."""
    path = directory / "generation_config.json"
    if not path.exists():
        return SamplingParams()
    data = read_json(path)
    names = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
    if data.get("do_sample"):
        names |= {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
        data = {"temperature": 1.0, **data}
    try:
        return SamplingParams(**{name: data[key] for key, name in names.items() if data.get(key) is not None})
    except ParameterError as error:
        raise ConfigError(f"{path}: {error}") from None


def open_checkpoint(directory: Path, use_plora: bool = True) -> Checkpoint:
    """Open and check a directory: every tensor present, none unexpected, every shape right.

    Reads configuration and file headers only. Raises CheckpointError, ModelNotFoundError.
    """
    config = read_config(directory)
    own = stored_tensors(directory)
    if not own:
        raise CheckpointError(f"{directory}: no *.safetensors files (other weight formats are not read)")
    adapter = find_adapter(directory, config, own) if use_plora else None
    tensors = {name: tensor for name, tensor in own.items() if not is_plora(name)}
    if adapter is not None:
        tensors.update(adapter.tensors)
    specs = expected_tensors(config, adapter.plora if adapter else None, config.quantization)
    _check_names(directory, specs, tensors)
    _check_shapes(directory, specs, tensors, adapter)
    _check_dtypes(directory, specs, tensors)
    return Checkpoint(directory, config, adapter, tensors, specs)


def _check_names(directory: Path, specs: Mapping[str, TensorSpec], tensors: Mapping[str, StoredTensor]) -> None:
    missing = [name for name in specs if name not in tensors]
    unexpected = [name for name in tensors if name not in specs]
    if missing and all(is_plora(name) for name in missing) and not unexpected:
        raise CheckpointError(
            f"{directory}: {len(missing)} PLoRA tensors missing: {list_names(missing)}; "
            "run without PLoRA only by --no-plora"
        )
    problems = [f"{len(missing)} tensors missing: {list_names(missing)}"] if missing else []
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected tensors: {list_names(unexpected)}")
    if problems:
        raise CheckpointError(f"{directory}: {'; '.join(problems)}")


def _check_shapes(
    directory: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Mapping[str, StoredTensor],
    adapter: Adapter | None,
) -> None:
    wrong = [
        f"{name} is {list(tensors[name].shape)} but must be {list(spec.stored_shape)}"
        for name, spec in specs.items()
        if tensors[name].shape != spec.stored_shape
    ]
    if wrong:
        rank = f" (PLoRA rank from {adapter.plora.source})" if adapter and "Plora" in wrong[0] else ""
        raise CheckpointError(f"{directory}: {len(wrong)} tensors of wrong shape: {list_names(wrong)}{rank}")


def _check_dtypes(directory: Path, specs: Mapping[str, TensorSpec], tensors: Mapping[str, StoredTensor]) -> None:
    wrong = [name for name, spec in specs.items() if tensors[name].dtype not in allowed_dtypes(spec)]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{directory}: {len(wrong)} tensors of wrong dtype: {list_names(wrong)}; {first} is "
            f"{tensors[first].dtype} and must be {' or '.join(allowed_dtypes(specs[first]))} by config.json"
        )


def allowed_dtypes(spec: TensorSpec) -> tuple[str, ...]:
    """What the file may call the dtype of a tensor."""
    if spec.own_dtype is None:
        return tuple(STORED_DTYPES)
    known = {**STORED_DTYPES, **QUANTIZED_DTYPES}
    return tuple(stored for stored, name in known.items() if getattr(torch, name) == spec.own_dtype)


def list_names(names: Iterable[str], most: int = _NAMES_SHOWN) -> str:
    """The first of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
