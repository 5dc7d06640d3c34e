"""The C++ extension: its shape contract, and life without it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
needs_extension = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(7)), "rms_norm: weight has 7 in dimension hidden_size, not 8"),
        (dict(weight=torch.ones(1, 8)), "rms_norm: weight must have 1 dimensions"),
        (dict(out=torch.empty(2, 8)), "rms_norm: out has 2 in dimension rows, not 3"),
        (dict(x=torch.ones(8, 3).T), "rms_norm: x must have contiguous rows"),
        (dict(x=torch.ones(3, 16)[:, :8]), "rms_norm: x must be contiguous"),
        (dict(weight=torch.ones(8, dtype=torch.bfloat16)), "rms_norm: dtypes differ"),
    ],
)
def test_cpp_refuses_what_breaks_the_contract(change, message):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    tensors = {"x": torch.ones(3, 8), "weight": torch.ones(8), "out": torch.empty(3, 8), **change}
    arguments = {name: as_argument(tensor) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        _kernels.rms_norm(arguments["x"], arguments["weight"], 1e-5, arguments["out"])


@needs_extension
def test_cpp_refuses_null_and_unknown_dtype():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    good = as_argument(torch.ones(1, 8))
    with pytest.raises(ValueError, match="x is null"):
        _kernels.rms_norm((0, *good[1:]), as_argument(torch.ones(8)), 1e-5, good)
    with pytest.raises(ValueError, match="x has an unknown dtype"):
        _kernels.rms_norm((good[0], 9, *good[2:]), as_argument(torch.ones(8)), 1e-5, good)


@needs_extension
def test_the_kernel_takes_part():
    """Loaded kernels are chosen, not only available."""
    from wemm.kernels import load_kernels
    from wemm.ops.rms_norm import rms_norm

    if os.environ.get("WEMM_KERNELS") == "none":
        pytest.skip("kernels are turned off by WEMM_KERNELS=none")
    load_kernels("cpu")
    [cpp] = [i for i in rms_norm.implementations if i.device == "cpu"]
    assert cpp.name == "cpp"
    x, weight = torch.randn(4, 64), torch.randn(64)
    with torch.inference_mode():
        assert rms_norm._choose(x, weight, 1e-5) is cpp.function


_ANSWER = """
import sys
if {block}: sys.modules["wemm.kernels.cpu._kernels"] = None
import importlib.util
if {block}:
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda n, *a: None if n.endswith("._kernels") else found(n, *a)
from wemm import LLM, SamplingParams
from wemm.ops.rms_norm import rms_norm
with LLM("tiny", dtype="float32", device="cpu") as llm:
    [out] = llm.chat([{{"role": "user", "content": "Why is the ocean blue?"}}], SamplingParams(max_tokens=8))
print(len(rms_norm.implementations), out.outputs[0].token_ids)
"""


@pytest.mark.parametrize(("block", "kernels"), [(True, "auto"), (False, "none")], ids=["absent", "turned off"])
def test_without_the_extension_answers_are_the_same(llm, block, kernels):
    from wemm import SamplingParams

    environment = {**os.environ, "WEMM_KERNELS": kernels}
    result = subprocess.run(
        [sys.executable, "-c", _ANSWER.format(block=block)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    [output] = llm.chat([{"role": "user", "content": "Why is the ocean blue?"}], SamplingParams(max_tokens=8))
    assert result.stdout.split(maxsplit=1) == ["0", f"{output.outputs[0].token_ids}\n"]


def test_an_unknown_kernel_choice_is_refused(monkeypatch):
    from wemm.errors import ParameterError
    from wemm.kernels import load_kernels

    monkeypatch.setenv("WEMM_KERNELS", "fastest")
    with pytest.raises(ParameterError, match="WEMM_KERNELS must be auto or none. Given: 'fastest'"):
        load_kernels("cpu")


@pytest.mark.parametrize(("best", "number"), [("portable", 0), ("avx2", 1)])
def test_the_environment_limits_the_instruction_set(best, number):
    script = (
        "from wemm.kernels import load_kernels; load_kernels('cpu');"
        "from wemm.kernels.cpu import _kernels; print(_kernels.isa())"
    )
    environment = {**os.environ, "WEMM_CPU_ISA": best}
    printed = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert int(printed) <= number


def test_an_unknown_instruction_set_is_refused():
    result = subprocess.run(
        [sys.executable, "-m", "wemm", "generate", "--model", "nano", "--prompt", "?"],
        env={**os.environ, "WEMM_CPU_ISA": "avx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == "error: WEMM_CPU_ISA must be one of portable, avx2, avx512, amx. Given: 'avx'\n"
