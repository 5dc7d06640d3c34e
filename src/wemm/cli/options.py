"""Options that commands share, generated from the dataclasses they fill: one name everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from wemm.config import EngineConfig, format_bytes, parse_bytes
from wemm.errors import ParameterError
from wemm.request import SamplingParams

_SAMPLING_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "min_tokens",
    "repetition_guard",
    "ignore_eos",
)
_PARSERS: dict[str, Callable[[str], Any]] = dict.fromkeys(
    ("kv_cache_memory", "image_cache_memory", "max_image_size", "max_body_size", "max_queued_bytes"), parse_bytes
)
_SHORT = {"model": "-m"}
_MODEL_HELP = EngineConfig.__dataclass_fields__["model"].metadata["help"]

Config = TypeVar("Config")


class SamplingOverrides:
    """The sampling options that were given; the others stay the checkpoint's."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = {name: value for name, value in given.items() if value is not None and value != []}

    def apply(self, default: SamplingParams) -> SamplingParams:
        """Parameters in force. Raises ParameterError."""
        return replace(default, **self._given)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of EngineConfig as an option; it takes them as `engine`."""
    return add_options(command, "engine", engine_parameters(), lambda given: EngineConfig(**given))


def model_and_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same with the model as an argument, for commands that are about a model."""
    argument = Annotated[str, typer.Argument(metavar="M", help=_MODEL_HELP)]
    model = inspect.Parameter("model", inspect.Parameter.KEYWORD_ONLY, annotation=argument)
    return add_options(command, "engine", engine_parameters(model), lambda given: EngineConfig(**given))


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the sampling options; it takes them as `sampling`."""
    return add_options(command, "sampling", _sampling_parameters(), SamplingOverrides)


def config_options(config: type[Any], target: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every field of a documented dataclass as an option; it takes the dataclass as `target`."""
    return lambda command: add_options(command, target, config_parameters(config), lambda given: config(**given))


class ServeOptions:
    """What `wemm serve` was told on the command line, which wins over a file."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def engine(self, context: typer.Context, from_file: Mapping[str, Any]) -> EngineConfig:
        """Raises ParameterError if neither says which model."""
        values = self._merged(EngineConfig, context, from_file)
        if not values.get("model"):
            raise ParameterError("give --model, or --config with a file that names one", "model")
        return EngineConfig(**values)

    def server(self, config: type[Config], context: typer.Context, from_file: Mapping[str, Any]) -> Config:
        """The other half."""
        return config(**self._merged(config, context, from_file))

    def given(self, context: typer.Context) -> dict[str, Any]:
        """What the command line itself holds."""
        return {name: value for name, value in self._values.items() if _is_given(context, name)}

    def _merged(self, config: Any, context: typer.Context, from_file: Mapping[str, Any]) -> dict[str, Any]:
        own = {field.name: self._values[field.name] for field in fields(config)}
        return {**own, **{name: value for name, value in from_file.items() if not _is_given(context, name)}}


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def serve_options(config: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every field of EngineConfig and of the server's config; it takes them as `options`."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [*config_parameters(config), *engine_parameters(optional_model())]
        return add_options(command, "options", parameters, ServeOptions)

    return add


def add_options(
    command: Callable[..., None],
    target: str,
    parameters: list[inspect.Parameter],
    collect: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """Give a command parameters; it takes what `collect` makes of their values as `target`."""
    names = [parameter.name for parameter in parameters]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        collected = {name: given.pop(name) for name in names}
        for name, parse in _PARSERS.items():
            if isinstance(collected.get(name), str):
                collected[name] = parse(collected[name])
        command(**given, **{target: collect(collected)})

    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != target
    ]
    wrapped.__signature__ = inspect.Signature([*own, *parameters])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *parameters]}
    return wrapped


def engine_parameters(model: inspect.Parameter | None = None) -> list[inspect.Parameter]:
    """Every field of EngineConfig, `model` in place of the one that must be given."""
    parameters = config_parameters(EngineConfig)
    return [model if model is not None and p.name == "model" else p for p in parameters]


def optional_model() -> inspect.Parameter:
    """For commands that may find it elsewhere."""
    return _parameter("model", str | None, _MODEL_HELP, None)


def config_parameters(config: type[Any]) -> list[inspect.Parameter]:
    """Every field of a documented dataclass (`wemm.config.option`)."""
    hints = get_type_hints(config)
    parameters = []
    for field in fields(config):
        default = field.default if field.default is not MISSING else field.default_factory
        if default is MISSING:
            default = ...
        elif callable(default):
            default = default()
        kind = str | None if field.name in _PARSERS else hints[field.name]
        if field.name in _PARSERS and isinstance(default, int):
            default = format_bytes(default)
        parameters.append(_parameter(field.name, kind, field.metadata["help"], default))
    return parameters


def _sampling_parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(SamplingParams)
    by_name = {field.name: field for field in fields(SamplingParams)}
    parameters = []
    for name in _SAMPLING_OPTIONS:
        kind, text, default = hints[name], by_name[name].metadata["help"], by_name[name].default
        if name == "stop":
            kind, text = list[str], f"{text} May be repeated."
        elif not isinstance(default, bool):
            text = f"{text} Default: {default:g}, or what generation_config.json says."
        parameters.append(_parameter(name, kind | None, text, None))
    return parameters


def _parameter(name: str, kind: Any, text: str, default: Any) -> inspect.Parameter:
    kinds = (kind, *getattr(kind, "__args__", ()))
    flags = [f"--{name.replace('_', '-')}"]
    if bool in kinds:
        flags = [f"{flags[0]}/--no-{name.replace('_', '-')}"]
    if name in _SHORT:
        flags.append(_SHORT[name])
    metavar = "SIZE" if name in _PARSERS else "PATH" if Path in kinds else "TEXT" if list[str] in kinds else None
    option = typer.Option(*flags, help=text, show_default=default is not None, metavar=metavar)
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty if default is ... else default,
        annotation=Annotated[kind, option],
    )
