"""Every op × implementation × case × dtype against its float32 definition, at the published tolerance."""

from __future__ import annotations

import pytest
import torch

from wemm.benchmark.ops import load_ops
from wemm.kernels import load_kernels
from wemm.ops.registry import DEFINITION, OPS, Inputs, definitions_only

load_ops()
load_kernels("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _several_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _wide(argument):
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.float() if is_float else argument


def _clone(arguments):
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def _as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def check(op, implementation, dtype, device):
    """Compare one implementation on every case it supports; returns how many it ran."""
    cases = op.cases(Inputs(dtype, device)).items()
    return sum(compare(op, implementation, case, arguments, dtype) for case, arguments in cases)


def compare(op, implementation, case, arguments, dtype):
    """One case; returns whether the implementation takes it."""
    supported = implementation == DEFINITION or any(
        i.name == implementation and i.supports(*arguments) for i in op.implementations
    )
    if not supported:
        return False
    tolerance = op.tolerances[dtype]
    # An op of float32 alone has such results whatever the model computes in.
    own = dtype if any(isinstance(a, torch.Tensor) and a.dtype is dtype for a in arguments) else torch.float32
    with torch.inference_mode(), op.using(implementation):
        got = _as_tuple(op(*_clone(arguments)))
    with torch.inference_mode(), definitions_only():  # also of the ops that a definition calls
        oracle = _as_tuple(op.definition(*(_wide(a) for a in _clone(arguments))))
    for actual, expected in zip(got, oracle, strict=True):
        assert actual.dtype == (own if expected.is_floating_point() else expected.dtype)
        torch.testing.assert_close(
            actual.float(), expected.float(), rtol=tolerance.rtol, atol=tolerance.atol,
            msg=lambda text: f"{op.name} {implementation} {case}: {text}",
        )  # fmt: skip
    return True


PAIRS = [
    (name, implementation)
    for name, op in OPS.items()
    for implementation in (DEFINITION, *(i.name for i in op.implementations if i.device == "cpu"))
]


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_parity(name, implementation):
    ran = {dtype: check(OPS[name], implementation, dtype, CPU) for dtype in DTYPES}
    if implementation == DEFINITION:
        assert ran == {dtype: len(OPS[name].cases(Inputs(dtype, CPU))) for dtype in DTYPES}
    assert any(ran.values()), "a kernel that takes no case is never compared"


def test_every_op_module_declares_an_op():
    from pathlib import Path

    import wemm.ops

    files = {path.stem for path in Path(wemm.ops.__path__[0]).glob("*.py")} - {"__init__", "registry"}
    assert files == set(OPS)


def test_a_wrong_kernel_is_caught():
    """The guard itself: a kernel that is off by twice the tolerance fails the comparison."""
    op = OPS["rms_norm"]
    off = 1 + 2 * op.tolerances[torch.float32].rtol + 1e-4

    @op.impl("wrong", device="cpu", supports=lambda *a: True)
    def _(x, weight, eps):
        return op.definition(x, weight, eps) * off

    try:
        with pytest.raises(AssertionError, match="rms_norm wrong prefill"):
            check(op, "wrong", torch.float32, CPU)
    finally:
        op.implementations.pop()
