"""One picture and one prompt through the engine and through the float32 definitions, compared stage by stage."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from wemm.config import UNQUANTIZED, QuantizationConfig
from wemm.model.wemm import WemmModel

Sink = Callable[[str, torch.Tensor], None]
"""Takes the name of a stage and what left it, rows first."""

PIXELS, EMBEDDED, LOGITS = "pixels", "embedded prompt", "logits"

# Relative error per rounding: half the spacing of neighbouring numbers. An activation is rounded some dozen times
# per layer, and independent errors grow with the root of their number: unit * sqrt(roundings).
_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_ROUNDINGS_PER_LAYER = 12
_SLACK = 1.0
# Of a layer whose weights are rounded to integers, and what they multiply: one and a half times what random
# weights of the real widths show; trained ones show less.
_QUANTIZED = {None: 0.0, "int8": 0.042, "int4": 0.29}
# Sums of thousands of products in another order, where nothing else is rounded.
FLOAT32_FLOOR = 1e-4
# The worst row may be this many times as far off as all rows together.
_WORST_ROW = 8.0


@dataclass(frozen=True)
class Depth:
    """Layers before the end of a stage, and how many of them belong to which part."""

    layers: int
    tower_layers: int = 0
    decoder_layers: int = 0


@dataclass(frozen=True)
class Precision:
    """What the engine computes in."""

    dtype: str
    quantization: QuantizationConfig = UNQUANTIZED

    def limit(self, depth: Depth) -> float:
        """Relative error that roundings alone explain there."""
        roundings = _SLACK * _UNIT[self.dtype] * math.sqrt(_ROUNDINGS_PER_LAYER * max(depth.layers, 1))
        tower = _QUANTIZED[self.quantization.vision] * math.sqrt(depth.tower_layers)
        decoder = _QUANTIZED[self.quantization.language] * math.sqrt(depth.decoder_layers)
        return max(math.hypot(roundings, tower, decoder), FLOAT32_FLOOR)

    def __str__(self) -> str:
        return f"{self.dtype}, {self.quantization}" if self.quantization else self.dtype


@dataclass(frozen=True)
class Stage:
    """How far the chosen dtype and device are from the float32 definitions behind one stage."""

    name: str
    max_error: float
    relative_error: float
    """Root mean square over rows of |difference| / |row|."""
    worst_row: float
    """The same of the worst row."""
    cosine: float
    """Of the worst row."""
    largest: float
    """max |activation| in the chosen dtype."""
    largest_float32: float
    limit: float
    """What `relative_error` may be."""
    reached: bool = True
    """False if the engine stopped before."""

    @property
    def is_ok(self) -> bool:
        """Within the limit, every row within a multiple of it."""
        return self.relative_error <= self.limit and self.worst_row <= _WORST_ROW * self.limit


@dataclass
class Ranges:
    """max |x| of what goes into and comes out of every module with weights."""

    largest: dict[str, float] = field(default_factory=dict)
    first_nonfinite: str | None = None

    def note(self, name: str, values: torch.Tensor) -> None:
        """One more tensor at this place."""
        largest = values.detach().abs().max().item() if values.numel() else 0.0
        if not math.isfinite(largest):
            self.first_nonfinite = self.first_nonfinite or name
        else:
            self.largest[name] = max(self.largest.get(name, 0.0), largest)


@contextmanager
def observed(model: WemmModel, sink: Sink, ranges: Ranges) -> Iterator[None]:
    """Inside, every stage of `model` reports what leaves it, and every module its range."""
    handles = [*_stage_hooks(model, sink), *_range_hooks(model, ranges)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stage_hooks(model: WemmModel, sink: Sink) -> Iterator[Any]:
    tower, language = model.vision_tower, model.language_model
    outputs: dict[str, nn.Module] = {"patch embeddings": tower.embeddings}
    outputs |= {f"tower layer {i}": layer for i, layer in enumerate(tower.encoder.layers)}
    outputs |= {"vision tower": tower.post_layernorm, "downsampler": model.downsampler}
    outputs |= {f"decoder layer {i}": layer for i, layer in enumerate(language.layers)}
    outputs[LOGITS] = language.output
    for name, module in outputs.items():
        yield module.register_forward_hook(lambda m, given, output, name=name: sink(name, output))
    inputs = {PIXELS: tower.embeddings, EMBEDDED: language.layers[0]}
    for name, module in inputs.items():
        yield module.register_forward_pre_hook(lambda m, given, name=name: sink(name, given[0]))


def _range_hooks(model: WemmModel, ranges: Ranges) -> Iterator[Any]:
    for name, module in model.named_modules():
        if name and list(module.parameters(recurse=False)):
            yield module.register_forward_pre_hook(
                lambda m, given, name=name: _note_inputs(ranges, f"the input of {name}", given)
            )
            yield module.register_forward_hook(
                lambda m, given, output, name=name: _note_outputs(ranges, name, output)
            )


def _note_outputs(ranges: Ranges, name: str, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    for values in output if isinstance(output, tuple) else (output,):
        ranges.note(name, values)


def _note_inputs(ranges: Ranges, name: str, given: tuple[Any, ...]) -> None:
    if given and isinstance(given[0], torch.Tensor) and given[0].is_floating_point():
        ranges.note(name, given[0])


class Recording:
    """What left the stages of an engine, kept in main memory, rows of later calls below those of earlier ones."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = defaultdict(list)

    def take(self, name: str, output: torch.Tensor) -> None:
        """A `Sink`."""
        self._parts[name].append(output.detach().to("cpu", copy=True))

    def pop(self, name: str) -> torch.Tensor | None:
        """All rows of a stage, once."""
        parts = self._parts.pop(name, None)
        return torch.cat(parts) if parts else None


def compare(name: str, given: torch.Tensor | None, oracle: torch.Tensor, allowed: float) -> Stage:
    """One stage, whose relative error may be `allowed`. Rows that only one side computed are left out."""
    oracle = oracle.detach().to("cpu", torch.float32)
    largest = oracle.abs().max().item()
    if given is None:
        return Stage(name, math.nan, math.nan, math.nan, math.nan, math.nan, largest, allowed, reached=False)
    rows = min(len(given), len(oracle))
    given, oracle = given[:rows].to(torch.float32), oracle[:rows]
    difference = given - oracle
    norms = oracle.norm(dim=-1).clamp(min=1e-12)
    relative = difference.norm(dim=-1) / norms
    cosine = torch.nn.functional.cosine_similarity(given, oracle, dim=-1)
    cosine = cosine.where(difference.any(dim=-1), torch.ones(()))  # rows of zeros have no direction
    return Stage(
        name,
        max_error=difference.abs().max().item(),
        relative_error=relative.square().mean().sqrt().item(),
        worst_row=relative.max().item(),
        cosine=cosine.min().item(),
        largest=given.abs().max().item(),
        largest_float32=largest,
        limit=allowed,
    )


def depths(model: WemmModel) -> Mapping[str, Depth]:
    """Stage → how deep it lies, in the order they run."""
    tower, decoder = len(model.vision_tower.encoder.layers), len(model.language_model.layers)
    order = {PIXELS: Depth(0), "patch embeddings": Depth(1)}
    order |= {f"tower layer {i}": Depth(i + 2, i + 1) for i in range(tower)}
    order["vision tower"] = Depth(tower + 2, tower)
    order["downsampler"] = order[EMBEDDED] = Depth(tower + 3, tower)
    order |= {f"decoder layer {i}": Depth(tower + 4 + i, tower, i + 1) for i in range(decoder)}
    order[LOGITS] = Depth(tower + decoder + 4, tower, decoder)
    return order


def shown(stages: Sequence[Stage]) -> list[Stage]:
    """For a table: of tower and decoder the first and the last layer, and whatever is wrong."""
    numbers: dict[str, list[int]] = defaultdict(list)
    for stage in stages:
        if match := re.fullmatch(r"(.+ layer) (\d+)", stage.name):
            numbers[match[1]].append(int(match[2]))
    ends = {f"{kind} {number}" for kind, found in numbers.items() for number in (min(found), max(found))}
    return [stage for stage in stages if " layer " not in stage.name or stage.name in ends or not stage.is_ok]
