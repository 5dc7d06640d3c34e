"""Weights that `wemm quantize` stored in fewer bits stay so. The products are ours; PLoRA beside them is float."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from wemm.config import DTYPES
from wemm.ops.linear_int4 import linear_int4
from wemm.ops.linear_int8 import linear_int8
from wemm.quantization import SCHEMES, Scheme

_PRODUCTS = {"int8": linear_int8, "int4": linear_int4}


@torch.library.custom_op("wemm::quantized_linear", mutates_args=())
def quantized_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    """[num_tokens, in] → [num_tokens, out], by the scheme's own product."""
    return _PRODUCTS[scheme](x, weight, scale, None)


@quantized_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, scheme: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


class QuantizedLinear(LinearMethodBase):
    """The linears of the decoder."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Integers and scales of this rank, cut as the float weight would be."""
        scheme, out_size = self._scheme, sum(output_partition_sizes)
        weight_shape = scheme.weight_shape(out_size, input_size_per_partition)
        scale_shape = scheme.scale_shape(out_size, input_size_per_partition)
        for name, shape, dtype in (
            ("weight", weight_shape, scheme.weight_dtype),
            ("weight_scale", scale_shape, scheme.scale_dtype),
        ):
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            dims = {"output_dim": 0, "input_dim": 1} if len(shape) > 1 else {"output_dim": 0}
            set_weight_attrs(parameter, {**dims, **extra_weight_attrs})
            layer.register_parameter(name, parameter)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, out]."""
        return torch.ops.wemm.quantized_linear(x, layer.weight, layer.weight_scale, self._scheme.name)


@register_quantization_config("wemm")
class WemmQuantization(QuantizationConfig):
    """`quant_method` wemm of config.json; which scheme is read again from the model's own configuration."""

    def __init__(self, language: str | None) -> None:
        super().__init__()
        self._language = language

    def get_name(self) -> str:
        """Of the method."""
        return "wemm"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those of the model."""
        return [getattr(torch, name) for name in DTYPES]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: the definitions are plain torch."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """config.json holds it."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WemmQuantization:
        """The section of config.json."""
        return cls(config.get("language_model"))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """For the linears of a decoder that is quantised; None: as it is."""
        if self._language is None or not isinstance(layer, LinearBase):
            return None
        return QuantizedLinear(SCHEMES[self._language])
