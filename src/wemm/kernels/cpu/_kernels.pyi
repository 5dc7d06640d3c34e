from wemm.kernels.cpu.tensors import TensorArgument

def rms_norm(x: TensorArgument, weight: TensorArgument, eps: float, out: TensorArgument) -> None: ...
def vision_attention(
    query: TensorArgument,
    key: TensorArgument,
    value: TensorArgument,
    cu_seqlens: list[int],
    scale: float,
    out: TensorArgument,
) -> None: ...
def prefill_attention(
    query: TensorArgument,
    key_cache: TensorArgument,
    value_cache: TensorArgument,
    block_tables: list[list[int]],
    cu_seqlens_q: list[int],
    seq_lens: list[int],
    scale: float,
    out: TensorArgument,
) -> None: ...
def has_avx512_bf16() -> bool: ...
def has_amx_bf16() -> bool: ...
