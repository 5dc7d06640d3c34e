"""The model's and the task's YAML files → settings. Unknown keys are errors, those without a meaning are named."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wemm.errors import ParameterError
from wemm.evaluation.run import DEFAULT_SUFFIX
from wemm.evaluation.scoring import SCORINGS

logger = logging.getLogger(__name__)

DTYPES = {"auto": "auto", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""The original's names, and ours."""
TOOL_DIRECTORY = Path(__file__).resolve().parents[1]

_NO_MEANING = None
_MODEL_KEYS: Mapping[str, Any] = {
    "model_name": str,
    "model_path": str,
    "data_type": str,
    "max_position_embedding": int,
    "block_size": int,
    "tp": int,
    "env": dict,
    "mm_model": {
        "prompt_prefix": str,
        "prompt_suffix": str,
        "infer_params": {
            "batch_size": int,
            "max_output_length": int,
            "ignore_eos": bool,
            "max_iters": _NO_MEANING,
        },
        "path": _NO_MEANING,
        "classname": _NO_MEANING,
        "warm_up_input_texts": _NO_MEANING,
        "warm_up_image_path": _NO_MEANING,
        "warm_up_video_path": _NO_MEANING,
        "warm_up_audio_path": _NO_MEANING,
    },
    "model_type": _NO_MEANING,
    "use_chat_template": _NO_MEANING,
    "requested_gpu_framework": _NO_MEANING,
    "trust_remote_code": _NO_MEANING,
}
_TASK_KEYS: Mapping[str, Any] = {
    "task_type": str,
    "task_name": str,
    "local_dataset_path": str,
    "shots": int,
    "requested_max_input_length": int,
    "requested_max_output_length": int,
    "metric": {"metric_type": str, "scoring": str},
    "hf_dataset_path": _NO_MEANING,
    "om_dataset_path": _NO_MEANING,
    "prompt": _NO_MEANING,
    "choices": _NO_MEANING,
    "need_logits": _NO_MEANING,
    "need_truncate_input": _NO_MEANING,
    "metadata": _NO_MEANING,
    "subject_mapping": _NO_MEANING,
}
_KINDS = {str: "text", int: "a whole number", bool: "true or false", dict: "a map"}


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is asked."""

    model_path: str
    model_name: str = "wemm"
    data_type: str = "auto"
    max_position_embedding: int = -1
    block_size: int = 128
    tp: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    prompt_prefix: str = ""
    prompt_suffix: str = DEFAULT_SUFFIX
    batch_size: int = 1
    max_output_length: int = 256
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _one_of("data_type", self.data_type, tuple(DTYPES))
        if not re.fullmatch(r"\w[\w.-]*", self.model_name):
            raise ParameterError(
                f"model_name becomes the name of a directory: letters, digits, _ - . Given: {self.model_name!r}"
            )


@dataclass(frozen=True)
class TaskSettings:
    """What is asked."""

    local_dataset_path: Path
    task_type: str = "precision"
    task_name: str = "textvqa"
    shots: int = 0
    requested_max_input_length: int = 4096
    requested_max_output_length: int = 4096
    metric_type: str = "acc"
    scoring: str = "official"

    def __post_init__(self) -> None:
        _one_of("task_type", self.task_type, ("precision",))
        _one_of("task_name", self.task_name, ("textvqa",))
        _one_of("metric_type", self.metric_type, ("acc",))
        _one_of("scoring", self.scoring, SCORINGS)
        if self.shots:
            raise ParameterError(f"shots must be 0: the model takes no examples. Given: {self.shots}")


def read_model(file: Path) -> ModelSettings:
    """Raises ParameterError naming file and key."""
    values = _read(file, _MODEL_KEYS)
    if not values.get("model_path"):
        raise ParameterError(f"{file}: model_path is missing: the directory of the checkpoint")
    values["env"] = {str(name): str(value) for name, value in values.get("env", {}).items()}
    return _of(file, ModelSettings, values)


def read_task(file: Path) -> TaskSettings:
    """Raises ParameterError naming file and key."""
    values = _read(file, _TASK_KEYS)
    if not values.get("local_dataset_path"):
        raise ParameterError(f"{file}: local_dataset_path is missing: the JSONL file of the questions")
    values["local_dataset_path"] = _data_file(Path(values["local_dataset_path"]).expanduser())
    return _of(file, TaskSettings, values)


def _read(file: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ParameterError("YAML files need the PyYAML package: pip install 'wemm[eval]'") from None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ParameterError(f"{file} cannot be read: {reason}") from None
    unused: list[str] = []
    values = _flatten(str(file), "", content, keys, unused)
    if unused:
        logger.warning("%s: without a meaning here: %s", file, ", ".join(unused))
    return values


def _flatten(file: str, place: str, content: Any, keys: Mapping[str, Any], unused: list[str]) -> dict[str, Any]:
    """Values by their own names, which are unique in a file; a key without a value counts as absent."""
    if not isinstance(content, dict):
        raise ParameterError(f"{file}: {place.rstrip('.') or 'the file'} must be a map. Given: {content!r}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in keys:
            raise ParameterError(f"{file}: unknown key {place}{name}; {_hint(str(name), keys)}")
        kind = keys[name]
        if value is None:
            continue
        if kind is _NO_MEANING:
            unused.append(f"{place}{name}")
        elif isinstance(kind, Mapping):
            values |= _flatten(file, f"{place}{name}.", value, kind, unused)
        elif type(value) is not kind:  # `true` is no number
            raise ParameterError(f"{file}: {place}{name} must be {_KINDS[kind]}. Given: {value!r}")
        else:
            values[name] = value
    return values


def _hint(name: str, keys: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, keys, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(keys)}"


def _of(file: Path, settings: Any, values: Mapping[str, Any]) -> Any:
    try:
        return settings(**values)
    except ParameterError as error:
        raise ParameterError(f"{file}: {error}") from None


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ParameterError(f"{name} must be {' or '.join(known)}. Given: {value!r}")


def _data_file(path: Path) -> Path:
    """The file, as given or below this tool's directory, or with `..` in front; in a directory the only JSONL."""
    places = [path, TOOL_DIRECTORY / path, Path("..") / path, TOOL_DIRECTORY / ".." / path]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ParameterError(f"local_dataset_path {path} does not exist")
    if not found.is_dir():
        return found
    files = sorted(found.glob("*.jsonl"))
    if len(files) != 1:
        raise ParameterError(f"local_dataset_path {found} holds {len(files)} JSONL files: name the one to ask")
    return files[0]
