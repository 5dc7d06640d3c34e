"""Options that commands share, generated from the dataclasses they fill: one name everywhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from typing import Annotated, Any, get_type_hints

import typer

from wemm.config import EngineConfig, parse_bytes
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
_PARSERS: dict[str, Callable[[str], Any]] = {"kv_cache_memory": parse_bytes, "image_cache_memory": parse_bytes}
_SHORT = {"model": "-m"}


class SamplingOverrides:
    """The sampling options that were given; the others stay the checkpoint's."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = {name: value for name, value in given.items() if value is not None and value != []}

    def apply(self, default: SamplingParams) -> SamplingParams:
        """Parameters in force. Raises ParameterError."""
        return replace(default, **self._given)


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every field of EngineConfig as an option; it takes them as `engine`."""
    return _add_options(command, "engine", _engine_parameters(), lambda given: EngineConfig(**given))


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the sampling options; it takes them as `sampling`."""
    return _add_options(command, "sampling", _sampling_parameters(), SamplingOverrides)


def _add_options(
    command: Callable[..., None],
    target: str,
    parameters: list[inspect.Parameter],
    collect: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
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


def _engine_parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(EngineConfig)
    parameters = []
    for field in fields(EngineConfig):
        required = field.default is MISSING
        kind = str | None if field.name in _PARSERS else hints[field.name]
        parameters.append(_parameter(field.name, kind, field.metadata["help"], ... if required else field.default))
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
    flags = [f"--{name.replace('_', '-')}"]
    if bool in (kind, *getattr(kind, "__args__", ())):
        flags = [f"{flags[0]}/--no-{name.replace('_', '-')}"]
    if name in _SHORT:
        flags.append(_SHORT[name])
    metavar = "TEXT" if name == "stop" else "SIZE" if name in _PARSERS else None
    option = typer.Option(*flags, help=text, show_default=default is not None, metavar=metavar)
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=empty if default is ... else default,
        annotation=Annotated[kind, option],
    )
