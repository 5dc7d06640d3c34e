"""vLLM loads what our commands write: converted, quantised, with PLoRA in a directory of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from tests.integrations.vllm.engines import answers, assert_same, vllm_engine
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY

pytestmark = pytest.mark.vllm
TINY = BUNDLED_DIRECTORY / "tiny"


def _written(command, target, *options):
    subprocess.run([sys.executable, "-m", "wemm", command, str(TINY), str(target), *options], check=True)
    return target


def _doubled_elsewhere(directory):
    """PLoRA of another directory takes the place of the checkpoint's own."""
    adapter = directory / "adapter"
    adapter.mkdir()
    factors = {}
    for file in directory.glob("*.safetensors"):
        factors |= {name: 2 * value for name, value in load_file(file).items() if "Plora_B" in name}
        factors |= {name: value for name, value in load_file(file).items() if "Plora_A" in name}
    save_file(factors, adapter / "adapter.safetensors")
    (adapter / "adapter_config.json").write_text((directory / "adapter_config.json").read_text())
    (directory / "lora_adapter.json").write_text(json.dumps({"wemm": "adapter"}))
    return directory


@pytest.mark.parametrize("kind", ["converted", "int8", "int4", "adapter"])
def test_the_same_answers(kind, tmp_path, conversations, ours):
    target = tmp_path / kind
    if kind in ("int8", "int4"):
        vision = ["--vision-scheme", "int8"] if kind == "int8" else []
        _written("quantize", target, "--scheme", kind, *vision)
    else:
        _written("convert", target)
        if kind == "adapter":
            _doubled_elsewhere(target)
    # Activations rounded to int8 turn a last bit into a step now and then.
    margin = 0.05 if kind in ("int8", "int4") else 1e-3
    with vllm_engine(target, max_num_batched_tokens=40) as engine:
        pairs = zip(ours(target), answers(engine, conversations), strict=True)
        compared = [assert_same(ours_alone, theirs, margin) for ours_alone, theirs in pairs]
    assert sum(compared) >= 10
