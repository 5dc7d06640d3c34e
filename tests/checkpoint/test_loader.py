"""Weights reach the model whole, in the dtype asked for, and each rank gets its slice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from wemm.checkpoint.checkpoint import open_checkpoint
from wemm.checkpoint.loader import load_dummy_weights, load_weights
from wemm.checkpoint.weight_map import canonical_name, expected_tensors, is_plora
from wemm.config import PRESETS
from wemm.distributed import TensorParallel
from wemm.errors import IntegrityError
from wemm.model.wemm import WemmModel

CPU = torch.device("cpu")


def _load(checkpoint, dtype=torch.float32, tensor_parallel=TensorParallel()):  # noqa: B008
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora, tensor_parallel)
    load_weights(model, checkpoint, dtype, CPU, tensor_parallel)
    return model


def test_the_table_names_exactly_the_parameters_of_the_model():
    """weight_map and the modules agree on every name and shape, also for the real sizes and with biases."""
    config, plora = PRESETS["wemm-chat-2k-cn"]
    biased = dataclasses.replace(config, downsampler=dataclasses.replace(config.downsampler, depth=3, bias=True))
    assert "downsampler.linear_model.3.bias" in expected_tensors(biased, None)
    for checked, used in ((config, plora), (config, None), (biased, None)):
        with torch.device("meta"):
            model = WemmModel(checked, used)
        parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert parameters == {s.parameter: s.shape for s in expected_tensors(checked, used).values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_value_arrives(tiny, dtype):
    checkpoint = open_checkpoint(tiny)
    parameters = dict(_load(checkpoint, dtype).named_parameters())
    stored = {}
    for file in tiny.glob("*.safetensors"):
        stored |= {canonical_name(name): tensor for name, tensor in load_file(file).items()}
    for name, spec in checkpoint.specs.items():
        assert torch.equal(parameters[spec.parameter], stored[name].to(dtype)), name


def test_no_memory_is_shared_with_the_files(tiny):
    """A file that changes under a running engine must not change its weights."""
    checkpoint = open_checkpoint(tiny)
    model = _load(checkpoint, torch.float16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for file in tiny.glob("*.safetensors"):
        with file.open("r+b") as shard:
            shard.seek(file.stat().st_size // 2)
            shard.write(b"\xff" * (file.stat().st_size // 2))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("size", [2, 4, 8])
def test_slices_of_all_ranks_make_the_whole(tiny, size):
    checkpoint = open_checkpoint(tiny)
    whole = dict(_load(checkpoint).named_parameters())
    ranks = [
        dict(_load(checkpoint, tensor_parallel=TensorParallel(r, size)).named_parameters()) for r in range(size)
    ]
    num_sharded = 0
    for name, full in whole.items():
        parts = [rank[name] for rank in ranks]
        dims = [d for d in range(full.dim()) if parts[0].shape[d] != full.shape[d]]
        if dims:
            num_sharded += 1
            assert torch.equal(torch.cat(parts, dim=dims[0]), full), name
        else:
            assert all(torch.equal(part, full) for part in parts), name
    # wqkv, wo, w1, w2, w3 and one low-rank factor of each, per layer; and the output head. Of the tower, whose
    # 3 heads cannot be shared, weight and bias of fc1 and weight of fc2 where its width can.
    vision = checkpoint.config.vision
    num_tower = 3 * vision.num_hidden_layers if vision.intermediate_size % size == 0 else 0
    assert num_sharded == 3 * 10 + 1 + num_tower


def test_a_size_that_ranks_cannot_share(tiny):
    with pytest.raises(IntegrityError, match="must be divisible by 3 ranks"):
        _load(open_checkpoint(tiny), tensor_parallel=TensorParallel(0, 3))


def test_progress_adds_up_to_the_weights(tiny):
    checkpoint = open_checkpoint(tiny)
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora)
    amounts = []
    load_weights(model, checkpoint, torch.float32, CPU, advance=amounts.append)
    assert sum(amounts) == 4 * sum(p.numel() for p in model.parameters())


def test_dummy_weights_are_repeatable_and_finite(tiny):
    checkpoint = open_checkpoint(tiny)
    models = []
    for seed in (1, 1, 2):
        with torch.device("meta"):
            models.append(WemmModel(checkpoint.config, checkpoint.plora))
        load_dummy_weights(models[-1], torch.bfloat16, CPU, seed)
    same, again, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert same.isfinite().all()
    assert same.dtype == torch.bfloat16


def test_plora_is_left_out_whole(tiny):
    checkpoint = open_checkpoint(tiny, use_plora=False)
    assert not any(is_plora(name) for name in checkpoint.tensors)
    assert not [name for name, _ in _load(checkpoint).named_parameters() if "plora" in name]


def test_dummy_norms_are_near_1_and_equal_shapes_differ(tiny):
    checkpoint = open_checkpoint(tiny)
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora)
    load_dummy_weights(model, torch.float32, CPU)
    assert model.language_model.norm.weight.mean().item() == pytest.approx(1, abs=0.1)
    assert model.vision_tower.post_layernorm.bias.mean().item() == pytest.approx(0, abs=0.1)
    layers = model.language_model.layers
    assert not torch.equal(layers[0].attention.wo.weight, layers[1].attention.wo.weight)


def test_a_model_the_checkpoint_does_not_fill(tiny):
    checkpoint = open_checkpoint(tiny)
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora)
    with pytest.raises(IntegrityError, match="parameters without a tensor: .*plora_a"):
        load_weights(model, open_checkpoint(tiny, use_plora=False), torch.float32, CPU)
    with torch.device("meta"):
        half = WemmModel(checkpoint.config, checkpoint.plora, TensorParallel(0, 2))
    with pytest.raises(IntegrityError, match="its slice is"):
        load_weights(half, checkpoint, torch.float32, CPU)
