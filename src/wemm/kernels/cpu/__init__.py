"""C++ kernels. Without the compiled extension nothing is attached and the definitions run.

`WEMM_CPU_ISA` in the environment names the best instruction set they may use: portable, avx2, avx512 or amx.
"""

from __future__ import annotations

import importlib.util
import logging
import os

from wemm.errors import ParameterError
from wemm.kernels.cpu.result_memory import release as release_memory  # noqa: F401 - called by wemm.kernels

_ISAS = ("portable", "avx2", "avx512", "amx")  # by number, as the extension counts them


def _limit_isa(best: str) -> None:
    if best not in _ISAS:
        raise ParameterError(f"WEMM_CPU_ISA must be one of {', '.join(_ISAS)}. Given: {best!r}")
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(_ISAS.index(best))


if importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None:
    _limit_isa(os.environ.get("WEMM_CPU_ISA", _ISAS[-1]))  # first: modules ask what there is when they are loaded
    from wemm.kernels.cpu import (  # noqa: F401 - each module attaches itself
        _kernels,
        add_plora,
        add_residual,
        decode_attention,
        layer_norm,
        linear,
        linear_gelu,
        linear_int4,
        linear_int8,
        linear_int8_gelu,
        rms_norm,
        rope_and_store_kv,
        silu_and_mul,
    )
    from wemm.kernels.cpu.recording import RECORDER  # noqa: F401 - called by wemm.kernels

    if _kernels.has_avx512_bf16():
        from wemm.kernels.cpu import prefill_attention, vision_attention  # noqa: F401
else:
    logging.getLogger(__name__).info("C++ extension not built: CPU ops run their definitions")
