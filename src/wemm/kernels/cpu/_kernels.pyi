from wemm.kernels.cpu.tensors import TensorArgument

def rms_norm(x: TensorArgument, weight: TensorArgument, eps: float, out: TensorArgument) -> None: ...
def layer_norm(
    x: TensorArgument, weight: TensorArgument, bias: TensorArgument, eps: float, out: TensorArgument
) -> None: ...
def silu_and_mul(gate: TensorArgument, up: TensorArgument, out: TensorArgument) -> None: ...
def add_residual(y: TensorArgument, x: TensorArgument) -> None: ...
def rope_and_store_kv(
    qkv: TensorArgument,
    cos: TensorArgument,
    sin: TensorArgument,
    key_cache: TensorArgument,
    value_cache: TensorArgument,
    slot_mapping: TensorArgument,
    out: TensorArgument,
) -> None: ...
def linear(
    x: TensorArgument, weight: TensorArgument, bias: TensorArgument | None, out: TensorArgument
) -> None: ...
def add_bias_gelu(x: TensorArgument, bias: TensorArgument) -> None: ...
def linear_int8(
    x: TensorArgument,
    weight: TensorArgument,
    scale: TensorArgument,
    bias: TensorArgument | None,
    out: TensorArgument,
) -> None: ...
def linear_int8_gelu(
    x: TensorArgument, weight: TensorArgument, scale: TensorArgument, bias: TensorArgument, out: TensorArgument
) -> None: ...
def linear_int4(
    x: TensorArgument,
    weight: TensorArgument,
    scale: TensorArgument,
    bias: TensorArgument | None,
    out: TensorArgument,
) -> None: ...
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
def decode_attention(
    query: TensorArgument,
    key_cache: TensorArgument,
    value_cache: TensorArgument,
    block_tables: TensorArgument,
    seq_lens: TensorArgument,
    scale: float,
    out: TensorArgument,
) -> None: ...
def limit_isa(isa: int) -> None: ...
def isa() -> int: ...
def has_avx512_bf16() -> bool: ...
def has_avx512_vnni() -> bool: ...

class Recording:
    def open(self) -> None: ...
    def close(self) -> None: ...
    def replay(self) -> None: ...
    def __len__(self) -> int: ...
