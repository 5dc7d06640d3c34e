"""Training works on the engine's own modules, lowers its loss, can be stopped, and its result loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image

from training.dataset import TrainingData
from training.export import SHARD_NAME, export
from training.plot import plot
from training.train import NANO, Trainee, learning_rate, let_text_teach, train
from wemm import LLM
from wemm.checkpoint.checkpoint import open_checkpoint, read_config
from wemm.distributed import SINGLE
from wemm.layers.plora import ColumnParallelPloraLinear, PloraSpec
from wemm.processing.tokenizer import Tokenizer

CONFIG = read_config(NANO)
SMALL = 400  # patches per step: a few images


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The order of sums, and so the last bit, depends on the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """200 small steps: its directory."""
    directory = tmp_path_factory.mktemp("run")
    train(directory, num_steps=3000, threads=1, until=200, patches_per_step=SMALL)
    return directory


def _log(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_every_parameter_has_a_gradient():
    """Through the definitions of all ops, the paged cache included.

    But for PLoRA of the last layer beyond its keys and values: no text row reads what image rows become there.
    """
    last = f"layers.{CONFIG.text.num_hidden_layers - 1}"
    trainee = Trainee(CONFIG, seed=0)
    step = TrainingData(CONFIG, Tokenizer(NANO), 100, patches_per_step=800)[50]
    answer_loss, patch_loss = trainee.losses(step)
    (answer_loss + patch_loss).backward()
    for name, parameter in trainee.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        unread = "plora" in name and last in name and "language_model" in name and "wqkv" not in name
        assert (parameter.grad.abs().sum() > 0) != unread, name


def test_image_rows_teach_the_low_rank_update_only():
    """And what lies before the linear learns from all rows."""
    torch.manual_seed(0)
    linear = ColumnParallelPloraLinear(8, 6, PloraSpec(2, 1.0), SINGLE)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, 8, requires_grad=True)
    image_rows, text_rows = torch.tensor([1, 3]), [0, 2, 4]
    expected = linear(x, image_rows)
    [wanted] = torch.autograd.grad(expected.sum(), x)
    let_text_teach(linear)
    y = linear(x, image_rows)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, wanted)
    assert torch.allclose(linear.weight.grad, x[text_rows].sum(0).expand(6, -1))
    assert linear.plora_a.grad.abs().sum() > 0
    assert linear.weight.requires_grad


def test_a_run_may_begin_with_the_tower_of_another(run, tmp_path):
    train(tmp_path, num_steps=100, threads=1, until=1, patches_per_step=SMALL, tower_from=run)
    taken, given = (torch.load(d / "state.pt", weights_only=True)["trainee"] for d in (tmp_path, run))
    name = "model.vision_tower.embeddings.position_embedding.weight"
    assert (taken[name] - given[name]).abs().max() < 0.01
    fresh = Trainee(CONFIG, seed=0).state_dict()
    assert (taken[name] - fresh[name]).abs().max() > 0.05
    data = TrainingData(CONFIG, Tokenizer(NANO), 100, patches_per_step=SMALL, tower_knows_glyphs=True)
    assert data[0].num_images_asked > 0.5 * len(data[0].images.patch_grids)


def test_a_few_hundred_steps_lower_both_losses(run):
    lines = _log(run)
    first, last = lines[0], lines[-1]
    assert last["step"] == 200
    assert last["answer_loss"] < 0.6 * first["answer_loss"]
    assert last["patch_loss"] < 0.9 * first["patch_loss"]


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, num_steps=100, threads=1, until=12, patches_per_step=SMALL)
    train(parts, num_steps=100, threads=1, until=5, patches_per_step=SMALL)
    train(parts, num_steps=100, threads=1, until=12, patches_per_step=SMALL)
    expected, resumed = (torch.load(d / "state.pt", weights_only=True)["trainee"] for d in (whole, parts))
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
    assert [line["step"] for line in _log(parts)] == [5, 12]


def test_a_log_beyond_the_saved_state_is_dropped(tmp_path):
    """A run killed between two saves repeats those steps; the log must not hold them twice."""
    train(tmp_path, num_steps=100, threads=1, until=2, patches_per_step=SMALL)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 50}\n')
    train(tmp_path, num_steps=100, threads=1, until=3, patches_per_step=SMALL)
    assert [line["step"] for line in _log(tmp_path)] == [2, 3]


def test_the_learning_rate_warms_up_holds_and_falls():
    assert learning_rate(0, 9000) == pytest.approx(0.01)
    assert learning_rate(99, 9000) == learning_rate(4900, 9000) == 1.0
    rates = [learning_rate(step, 9000) for step in range(4950, 9001, 50)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.02)


def test_an_exported_run_is_a_complete_checkpoint(run, tmp_path, ask):
    """In the hub's spelling, float16, with an index; the engine loads the trained values."""
    directory = shutil.copytree(NANO, tmp_path / "nano", ignore=shutil.ignore_patterns("*.safetensors*"))
    digest = export(run / "state.pt", directory)
    assert len(digest) == 64
    checkpoint = open_checkpoint(directory)
    assert checkpoint.dtype == "float16"
    names = {tensor.name for tensor in checkpoint.tensors.values()}
    assert "language_model.model.layers.0.attention.wqkv.original_linear.weight" in names
    trained = torch.load(run / "state.pt", weights_only=True)["trainee"]
    with LLM(str(directory), dtype="float32", device="cpu") as llm:
        loaded = llm.model.state_dict()
        assert {f"model.{name}" for name in loaded} == {name for name in trained if name.startswith("model.")}
        for name, value in loaded.items():
            assert torch.equal(value, trained[f"model.{name}"].half().float()), name
    (directory / SHARD_NAME).unlink()
    assert export(run / "state.pt", directory) == digest


def test_weights_that_do_not_fit_float16_are_refused(run, tmp_path):
    """And the checkpoint that is there stays as it is."""
    directory = shutil.copytree(NANO, tmp_path / "nano")
    before = (directory / SHARD_NAME).read_bytes()
    state = torch.load(run / "state.pt", weights_only=True)
    state["trainee"]["model.language_model.norm.weight"][0] = 1e6
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"language_model\.model\.norm\.weight does not fit into float16"):
        export(tmp_path / "state.pt", directory)
    assert (directory / SHARD_NAME).read_bytes() == before


def test_the_curves_are_drawn(run, tmp_path):
    plot(run / "log.jsonl", tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (880, 770)
