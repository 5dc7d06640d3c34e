"""A trained run → the bundled checkpoint, in the hub's layout: float16, original spelling, index.

python -m training.export RUN_DIRECTORY [DIRECTORY]
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

from training.train import NANO
from wemm.checkpoint.adapter import configured_plora
from wemm.checkpoint.checkpoint import read_config
from wemm.checkpoint.shards import INDEX_NAME
from wemm.checkpoint.weight_map import expected_tensors, plora_linears
from wemm.doctor.files import record_hashes
from wemm.progress import silent

SHARD_NAME = "model-00001-of-00001.safetensors"


def export(state_file: Path, directory: Path) -> str:
    """Write the weights of a saved training state beside the directory's config.json. Returns the SHA-256."""
    config = read_config(directory)
    trained = torch.load(state_file, weights_only=True)["trainee"]
    with_plora = {f"{linear}.weight" for linear in plora_linears(config)}
    tensors = {}
    for name, spec in expected_tensors(config, configured_plora(directory, config)).items():
        # The hub's files have the linears that carry PLoRA under this longer name.
        stored = name.replace(".weight", ".original_linear.weight") if name in with_plora else name
        value = trained[f"model.{spec.parameter}"].to(torch.float16)
        if not value.isfinite().all():
            raise ValueError(f"{name} does not fit into float16")
        tensors[stored] = value.contiguous()
    path = directory / SHARD_NAME
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": dict.fromkeys(sorted(tensors), SHARD_NAME),
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    record_hashes(directory, silent)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _main(
    run: Annotated[Path, typer.Argument(help="Directory of a training run.")],
    directory: Annotated[Path, typer.Argument(help="Where config.json lies.")] = NANO,
) -> None:
    """Write the weights of a run as a checkpoint and print their SHA-256."""
    print(f"{export(run / 'state.pt', directory)}  {directory / SHARD_NAME}")


if __name__ == "__main__":
    typer.run(_main)
