"""What the checkpoint calls a tensor, what we call it, and its shape: the one table.

The odd spellings of the original (`spliter`, `Plora_A`, `original_linear`) live in this file only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wemm.config import PLORA_LINEARS, UNQUANTIZED, ModelConfig, PloraConfig, QuantizationConfig
from wemm.quantization import Scheme, scheme_of

_LAYER = "language_model.model.layers.{i}"
_VISION_LAYER = "vision_tower.encoder.layers.{i}"

# (checkpoint name, our parameter name, shape in the words of `_dims`)
_VISION = [
    ("vision_tower.embeddings.patch_embedding.weight", "", ("vision", "channels", "patch", "patch")),
    ("vision_tower.embeddings.patch_embedding.bias", "", ("vision",)),
    ("vision_tower.embeddings.position_embedding.weight", "", ("positions", "vision")),
    *((f"{_VISION_LAYER}.self_attn.{name}.weight", "", ("vision", "vision"))
      for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *((f"{_VISION_LAYER}.self_attn.{name}.bias", "", ("vision",))
      for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *((f"{_VISION_LAYER}.{norm}.{kind}", "", ("vision",))
      for norm in ("layer_norm1", "layer_norm2") for kind in ("weight", "bias")),
    (f"{_VISION_LAYER}.mlp.fc1.weight", "", ("vision_intermediate", "vision")),
    (f"{_VISION_LAYER}.mlp.fc1.bias", "", ("vision_intermediate",)),
    (f"{_VISION_LAYER}.mlp.fc2.weight", "", ("vision", "vision_intermediate")),
    (f"{_VISION_LAYER}.mlp.fc2.bias", "", ("vision",)),
    ("vision_tower.post_layernorm.weight", "", ("vision",)),
    ("vision_tower.post_layernorm.bias", "", ("vision",)),
]  # fmt: skip
_DOWNSAMPLER = [
    ("downsampler.group_op.weight", "downsampler.conv.weight", ("hidden", "vision", "kernel", "kernel")),
    ("downsampler.linear_model.{odd}.weight", "downsampler.linears.{i}.weight", ("hidden", "hidden")),
]
_DOWNSAMPLER_BIAS = [
    ("downsampler.group_op.bias", "downsampler.conv.bias", ("hidden",)),
    ("downsampler.linear_model.{odd}.bias", "downsampler.linears.{i}.bias", ("hidden",)),
]
_SEPARATOR = [("visual_source_spliter_emb.weight", "separator_embedding.weight", ("separators", "hidden"))]
_LANGUAGE = [
    ("language_model.model.tok_embeddings.weight", "language_model.tok_embeddings.weight", ("vocab", "hidden")),
    (f"{_LAYER}.attention.wqkv.weight", "language_model.layers.{i}.attention.wqkv.weight", ("wqkv", "hidden")),
    (f"{_LAYER}.attention.wo.weight", "language_model.layers.{i}.attention.wo.weight", ("hidden", "hidden")),
    (f"{_LAYER}.feed_forward.w1.weight", "language_model.layers.{i}.feed_forward.w1.weight",
     ("intermediate", "hidden")),
    (f"{_LAYER}.feed_forward.w3.weight", "language_model.layers.{i}.feed_forward.w3.weight",
     ("intermediate", "hidden")),
    (f"{_LAYER}.feed_forward.w2.weight", "language_model.layers.{i}.feed_forward.w2.weight",
     ("hidden", "intermediate")),
    (f"{_LAYER}.attention_norm.weight", "language_model.layers.{i}.attention_norm.weight", ("hidden",)),
    (f"{_LAYER}.ffn_norm.weight", "language_model.layers.{i}.ffn_norm.weight", ("hidden",)),
    ("language_model.model.norm.weight", "language_model.norm.weight", ("hidden",)),
    ("language_model.output.weight", "language_model.output.weight", ("vocab", "hidden")),
]  # fmt: skip
SCALE_SUFFIX = "_scale"
"""Behind the name of a quantised weight: its scale, in the checkpoint as in our model."""
_VISION_LINEAR = re.compile(r"vision_tower\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight")
_LANGUAGE_LINEAR = re.compile(rf"language_model\.model\.layers\.\d+\.({'|'.join(PLORA_LINEARS)})\.weight")
PLORA_FACTORS = {".Plora_A.weight": ".plora_a", ".Plora_B.weight": ".plora_b"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a complete checkpoint."""

    name: str
    """Its name in a renamed checkpoint."""
    parameter: str
    """Its name in our model."""
    shape: tuple[int, ...]
    """Of the weight, or of the weight that this is the scale of."""
    scheme: Scheme | None = None
    """How it is quantised; None: it is not."""
    is_scale: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In the file and in our model."""
        if self.scheme is None:
            return self.shape
        out_size, in_size = self.shape
        return (self.scheme.scale_shape if self.is_scale else self.scheme.weight_shape)(out_size, in_size)

    @property
    def own_dtype(self) -> torch.dtype | None:
        """Of the integers or the scale of a quantised weight; None: the model's."""
        if self.scheme is None:
            return None
        return self.scheme.scale_dtype if self.is_scale else self.scheme.weight_dtype

    @property
    def scale_name(self) -> str:
        """The tensor that holds the scale of this one."""
        return self.name + SCALE_SUFFIX


def canonical_name(name: str) -> str:
    """The renamed spelling of a hub tensor name: `.original_linear.` dropped."""
    return name.replace(".original_linear.", ".")


def is_plora(name: str) -> bool:
    """True for a low-rank factor."""
    return name.endswith(tuple(PLORA_FACTORS))


def part_of(name: str) -> str:
    """The part of the model a tensor is counted under."""
    if is_plora(name):
        return "plora"
    return "separators" if name.startswith("visual_source") else name.split(".", 1)[0]


def plora_linears(config: ModelConfig) -> list[str]:
    """Checkpoint names of all linears that carry PLoRA."""
    layers = range(config.text.num_hidden_layers)
    return [plora_linear_name(i, linear) for i in layers for linear in PLORA_LINEARS]


def plora_linear_name(layer: int, linear: str) -> str:
    """Checkpoint name of one of PLORA_LINEARS in a decoder layer."""
    return f"{_LAYER.format(i=layer)}.{linear}"


def expected_tensors(
    config: ModelConfig, plora: PloraConfig | None, quantization: QuantizationConfig = UNQUANTIZED
) -> dict[str, TensorSpec]:
    """Every tensor of a complete checkpoint by its renamed name; `plora` None leaves the factors out."""
    dims = _dims(config)
    rows = [(row, config.vision.num_hidden_layers) for row in _VISION]
    rows += [(row, config.downsampler.depth - 1) for row in _DOWNSAMPLER]
    rows += [(row, config.downsampler.depth - 1) for row in _DOWNSAMPLER_BIAS if config.downsampler.bias]
    rows += [(row, 1) for row in _SEPARATOR]
    rows += [(row, config.text.num_hidden_layers) for row in _LANGUAGE]
    specs = []
    for (name, parameter, shape), count in rows:
        sizes = tuple(dims[word] for word in shape)
        repeats = range(count) if "{" in name else range(1)
        for i in repeats:
            filled = name.format(i=i, odd=2 * i + 1)
            specs.append(TensorSpec(filled, parameter.format(i=i) or filled, sizes))
    if plora is not None:
        weights = {spec.name: spec for spec in specs}
        for linear in plora_linears(config):
            weight = weights[f"{linear}.weight"]
            out_size, in_size = weight.shape
            rank, parameter = plora.rank(linear), weight.parameter.removesuffix(".weight")
            specs.append(TensorSpec(f"{linear}.Plora_A.weight", f"{parameter}.plora_a", (rank, in_size)))
            specs.append(TensorSpec(f"{linear}.Plora_B.weight", f"{parameter}.plora_b", (out_size, rank)))
    return {spec.name: spec for unquantized in specs for spec in _quantized(unquantized, quantization)}


def scheme_for(name: str, quantization: QuantizationConfig) -> Scheme | None:
    """How the tensor of a renamed name is stored."""
    if _LANGUAGE_LINEAR.fullmatch(name):
        return scheme_of(quantization.language)
    return scheme_of(quantization.vision) if _VISION_LINEAR.fullmatch(name) else None


def _quantized(spec: TensorSpec, quantization: QuantizationConfig) -> Iterator[TensorSpec]:
    scheme = scheme_for(spec.name, quantization)
    if scheme is None:
        yield spec
        return
    yield replace(spec, scheme=scheme)
    yield TensorSpec(spec.scale_name, spec.parameter + SCALE_SUFFIX, spec.shape, scheme, is_scale=True)


def _dims(config: ModelConfig) -> dict[str, int]:
    return {
        "vision": config.vision.hidden_size,
        "vision_intermediate": config.vision.intermediate_size,
        "channels": config.vision.num_channels,
        "patch": config.vision.patch_size,
        "positions": config.vision.position_grid**2,
        "kernel": config.downsampler.kernel_size,
        "separators": config.num_separators,
        "hidden": config.text.hidden_size,
        "intermediate": config.text.intermediate_size,
        "vocab": config.text.vocab_size,
        "wqkv": config.text.wqkv_out,
    }
