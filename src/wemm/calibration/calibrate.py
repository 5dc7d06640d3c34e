"""Samples through the decoder, layer by layer: what each linear is given decides how its weight is rounded.

One layer's float weights are in memory at a time, beside the hidden states of all samples and the integers so far.
A layer is given what leaves the quantised layers before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from wemm.calibration.gptq import DAMPING, gptq
from wemm.checkpoint.checkpoint import Checkpoint
from wemm.checkpoint.convert import Calibrated
from wemm.checkpoint.loader import load_weights
from wemm.checkpoint.weight_map import plora_linear_name
from wemm.config import PLORA_LINEARS, QuantizationConfig, VisionConfig
from wemm.engine.vision_encode import image_batch
from wemm.errors import NumericalError
from wemm.kernels import load_kernels
from wemm.layers.linear import QuantizableLinear
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel
from wemm.platforms import Platform
from wemm.processing.processor import ProcessedPrompt
from wemm.progress import Advance, ProgressBar, silent
from wemm.quantization import SCHEMES

_Item = TypeVar("_Item")

_BLOCK_SIZE = 16
_BEFORE_DECODER = ("vision_tower", "downsampler", "separator_embedding", "language_model.tok_embeddings")
_GIVEN_THE_SAME = {"feed_forward.w3": "feed_forward.w1"}
"""A linear, and another whose inputs are its own."""


@dataclass
class _Sample:
    """A prompt on its way through the layers."""

    batch: Batch
    hidden: torch.Tensor
    """[num_tokens, hidden_size], what left the last layer."""


@torch.inference_mode()
def calibrate(
    checkpoint: Checkpoint,
    prompts: Sequence[ProcessedPrompt],
    platform: Platform,
    dtype: str | None = None,
    progress: ProgressBar = silent,
    damping: float = DAMPING,
) -> Calibrated:
    """The decoder's linears in int4 for the tokens of `prompts`, of images and text alike.

    Computed as the engine would, in `dtype` (default: the platform's choice). Raises NumericalError where NaN or
    Inf reach a linear.
    """
    dtype = dtype or platform.preferred_dtype(checkpoint.dtype)
    load_kernels(platform.device.type)
    with torch.device("meta"):
        vision = QuantizationConfig(vision=checkpoint.config.quantization.vision)
        model = WemmModel(checkpoint.config, checkpoint.plora, quantization=vision)
    load = partial(load_weights, model, checkpoint, getattr(torch, dtype), platform.device)
    decoder = model.language_model
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    total = len(prompts) + len(decoder.layers) * (2 * len(prompts) + len(PLORA_LINEARS))
    with progress("calibrating", total, "steps") as advance:
        for part in _BEFORE_DECODER:
            load(part=part)
        embedded = partial(_embedded, model, checkpoint.config.vision, platform.device)
        samples = [embedded(prompt) for prompt in _counted(prompts, advance)]
        for part in _BEFORE_DECODER:
            model.get_submodule(part).to("meta")
        kv_cache = _layer_cache(model, samples)
        for i, layer in enumerate(decoder.layers):
            load(part=f"language_model.layers.{i}")
            hessians = _hessians(model, layer, _counted(samples, advance), kv_cache)
            for linear in _counted(PLORA_LINEARS, advance):
                name = f"{plora_linear_name(i, linear)}.weight"
                hessian = hessians[_GIVEN_THE_SAME.get(linear, linear)]
                if not hessian.isfinite().all():
                    raise NumericalError(f"calibration, {name}", dtype)
                weights[name] = gptq(checkpoint.read(name).to(platform.device), hessian, damping)
                _linear(layer, linear).store(SCHEMES["int4"], *weights[name])
            del hessians
            for sample in _counted(samples, advance):
                sample.hidden = _run(model, layer, sample, kv_cache)
            layer.to("meta")
    return Calibrated("gptq", len(prompts), {name: (w.cpu(), scale.cpu()) for name, (w, scale) in weights.items()})


def _counted(items: Iterable[_Item], advance: Advance) -> Iterable[_Item]:
    for item in items:
        yield item
        advance(1)


def _embedded(model: WemmModel, config: VisionConfig, device: torch.device, prompt: ProcessedPrompt) -> _Sample:
    """Alone in a batch, all of its tokens at once."""
    num_tokens = len(prompt.token_ids)
    visual, rows = [], []
    for span in prompt.image_spans:
        packed = image_batch([span.image], config, device)
        visual += model.visual_embeds(model.vision_tower(packed), packed.patch_grids)
        rows.append(torch.arange(span.start, span.stop, device=device))
    positions = torch.arange(num_tokens, device=device)
    input_ids, image_rows = torch.tensor(prompt.token_ids, device=device), torch.cat(rows) if rows else None
    batch = Batch(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=positions,
        block_tables=torch.arange(_num_blocks(num_tokens), dtype=torch.int32, device=device).unsqueeze(0),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        logits_rows=positions[-1:],
        cu_seqlens_q=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        image_rows=image_rows,
    )
    return _Sample(batch, model.embed(input_ids, torch.cat(visual) if visual else None, image_rows))


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // _BLOCK_SIZE)


def _layer_cache(model: WemmModel, samples: Sequence[_Sample]) -> torch.Tensor:
    """Keys and values of the longest sample in one layer."""
    longest = max(len(sample.hidden) for sample in samples)
    hidden = samples[0].hidden
    return hidden.new_empty(model.kv_cache_shape(_num_blocks(longest), _BLOCK_SIZE)[1:])


def _run(model: WemmModel, layer: nn.Module, sample: _Sample, kv_cache: torch.Tensor) -> torch.Tensor:
    angles = model.language_model.angles(sample.batch.positions)
    hidden: torch.Tensor = layer(sample.hidden, *angles, sample.batch, kv_cache)
    return hidden


def _linear(layer: nn.Module, name: str) -> QuantizableLinear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, QuantizableLinear)
    return linear


def _hessians(
    model: WemmModel, layer: nn.Module, samples: Iterable[_Sample], kv_cache: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """X^T X of each linear of a layer over all rows of all samples, float32 [in, in]."""
    linears = {name: _linear(layer, name) for name in PLORA_LINEARS if name not in _GIVEN_THE_SAME}
    sums = {
        name: torch.zeros(linear.in_size, linear.in_size, device=kv_cache.device)
        for name, linear in linears.items()
    }

    def add(name: str, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].to(torch.float32)
        sums[name].addmm_(x.T, x)

    handles = [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
    for sample in samples:
        _run(model, layer, sample, kv_cache)
    for handle in handles:
        handle.remove()
    return sums
