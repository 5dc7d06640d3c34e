"""InternLM2 with PLoRA: cached = uncached, chunked = whole, ranks = one, and a plain re-statement of the maths."""

from __future__ import annotations

import math
import socket
from functools import partial

import pytest
import torch
import torch.multiprocessing

import wemm.layers.linear
import wemm.layers.plora
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.checkpoint.loader import load_weights
from wemm.distributed import SINGLE, TensorParallel
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel

CPU = torch.device("cpu")
BLOCK_SIZE = 4
LENGTH = 23
IMAGE_ROWS = list(range(5, 14))
IDS = torch.randint(10, 600, (LENGTH,), generator=torch.Generator().manual_seed(0))
EMBEDS = torch.randn(len(IMAGE_ROWS), 128, generator=torch.Generator().manual_seed(1))


def _model(tensor_parallel=SINGLE):
    checkpoint = open_checkpoint(BUNDLED_DIRECTORY / "tiny")
    with torch.device("meta"):
        model = WemmModel(checkpoint.config, checkpoint.plora, tensor_parallel)
    load_weights(model, checkpoint, torch.float32, CPU, tensor_parallel)
    return model


@pytest.fixture(scope="module")
def model():
    return _model()


def _kv_cache(num_kv_heads=8):
    # NaN: whoever reads a slot before it is written is found out.
    return torch.full((3, 2, 8, BLOCK_SIZE, num_kv_heads, 8), float("nan"))


def _batch(start, stop, is_prefill=True):
    """Tokens [start, stop) of the one sequence, in blocks 7, 6, 5, …"""
    positions = torch.arange(start, stop)
    table = torch.arange(7, -1, -1)
    rows = [i for i in IMAGE_ROWS if start <= i < stop]
    return Batch(
        input_ids=IDS[start:stop],
        positions=positions,
        slot_mapping=table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=table[None].to(torch.int32),
        seq_lens=torch.tensor([stop], dtype=torch.int32),
        logits_rows=torch.tensor([stop - start - 1]),
        cu_seqlens_q=torch.tensor([0, stop - start], dtype=torch.int32) if is_prefill else None,
        image_rows=torch.tensor(rows) - start if rows else None,
        visual_embeds=EMBEDS[[i - IMAGE_ROWS[0] for i in rows]] if rows else None,
    )


def _logits(model, *batches, num_kv_heads=8):
    cache = _kv_cache(num_kv_heads)
    with torch.inference_mode():
        for batch in batches:
            hidden = model(batch, cache)
        return model.compute_logits(hidden)[0]


def _reference_logits(model):
    """The whole decoder once more, from the reference's sentences, without cache, ops or layers."""
    weights = dict(model.named_parameters())
    x = weights["language_model.tok_embeddings.weight"][IDS].clone()
    x[IMAGE_ROWS] = EMBEDS
    mask = torch.zeros(LENGTH, 1)
    mask[IMAGE_ROWS] = 1

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def plora(x, name):
        low_rank = (x * mask) @ weights[f"{name}.plora_a"].T @ weights[f"{name}.plora_b"].T
        return x @ weights[f"{name}.weight"].T + 2 * low_rank

    angles = torch.outer(torch.arange(LENGTH).float(), 1e6 ** -(torch.arange(0, 8, 2) / 8))
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

    def rope(x):
        return x * cos + torch.cat([-x[:, 4:], x[:, :4]], -1) * sin

    for i in range(3):
        prefix = f"language_model.layers.{i}"
        h = norm(x, f"{prefix}.attention_norm.weight")
        packed = plora(h, f"{prefix}.attention.wqkv").view(LENGTH, 8, 4, 8)
        heads = []
        for head in range(16):
            group, j = divmod(head, 2)
            q, k, v = rope(packed[:, group, j]), rope(packed[:, group, 2]), packed[:, group, 3]
            scores = (q @ k.T / math.sqrt(8)).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v)
        x = x + plora(torch.cat(heads, -1), f"{prefix}.attention.wo")
        h = norm(x, f"{prefix}.ffn_norm.weight")
        gate, up = plora(h, f"{prefix}.feed_forward.w1"), plora(h, f"{prefix}.feed_forward.w3")
        x = x + plora(gate * gate.sigmoid() * up, f"{prefix}.feed_forward.w2")
    return (norm(x, "language_model.norm.weight") @ weights["language_model.output.weight"].T)[-1]


def test_the_decoder_is_what_the_reference_says(model):
    with torch.inference_mode():
        expected = _reference_logits(model)
    torch.testing.assert_close(_logits(model, _batch(0, LENGTH)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 4, 5, 9, 14, 22], ids=lambda cut: f"cut at {cut}")
def test_a_prompt_in_two_chunks_equals_the_whole(model, cut):
    """Also where the cut falls into the image (rows 5 to 13): PLoRA acts on exactly its rows in both."""
    whole = _logits(model, _batch(0, LENGTH))
    torch.testing.assert_close(_logits(model, _batch(0, cut), _batch(cut, LENGTH)), whole, rtol=1e-4, atol=1e-4)


def test_decode_equals_prefill(model):
    steps = [_batch(0, 16), *(_batch(i, i + 1, is_prefill=False) for i in range(16, LENGTH))]
    torch.testing.assert_close(_logits(model, *steps), _logits(model, _batch(0, LENGTH)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("image_rows", [None, torch.tensor([1, 4, 5])], ids=["text", "images"])
def test_w1_and_w3_are_computed_together_unless_one_is_watched(model, monkeypatch, image_rows):
    """Whoever hooks a linear, as calibration and the doctor do, sees it called; the result is the same."""
    feed_forward, x = model.language_model.layers[0].feed_forward, torch.randn(7, 128)
    seen = []

    def spy(module, name):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: [seen.append(name), op(*arguments)][1])

    spy(wemm.layers.linear, "linear_silu_and_mul")
    spy(wemm.layers.plora, "add_plora_pair")
    with torch.inference_mode():
        together = feed_forward(x, image_rows)
        assert seen == ["linear_silu_and_mul" if image_rows is None else "add_plora_pair"]
        for linear in ("w1", "w3"):
            note = partial(lambda name, *_: seen.append(name), linear)
            for register in ("register_forward_hook", "register_forward_pre_hook"):
                seen.clear()
                handle = getattr(getattr(feed_forward, linear), register)(note)
                assert torch.equal(feed_forward(x, image_rows), together)
                handle.remove()
                assert seen == [linear]


def test_image_rows_matter(model):
    """The guard of the tests above: without its image rows the same prompt gives other logits."""
    import dataclasses

    plain = dataclasses.replace(
        _batch(0, LENGTH), image_rows=torch.tensor(IMAGE_ROWS[:-1]), visual_embeds=EMBEDS[:-1]
    )
    assert not torch.allclose(_logits(model, plain), _logits(model, _batch(0, LENGTH)), rtol=1e-2, atol=1e-2)


def test_gradients_flow_through_the_definitions():
    """Training on these modules: every parameter of the decoder, PLoRA included, gets a finite gradient.

    In the last layer only wqkv's update can matter to the last token: image rows speak to it as keys and values.
    """
    model = _model()
    model.requires_grad_(True)
    hidden = model(_batch(0, LENGTH), torch.zeros(3, 2, 8, BLOCK_SIZE, 8, 8))
    model.compute_logits(hidden).logsumexp(-1).sum().backward()
    for name, parameter in model.language_model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if "plora" in name and ("layers.2" not in name or "wqkv" in name):
            assert parameter.grad.abs().sum() > 0, name


def _rank_logits(rank, size, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        model = _model(TensorParallel(rank, size))
        steps = [_batch(0, 16), *(_batch(i, i + 1, is_prefill=False) for i in range(16, LENGTH))]
        results.put((rank, _logits(model, *steps, num_kv_heads=8 // size).numpy()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_equal_one(model, size):
    """Prefill with PLoRA and decode over gloo processes; every rank ends with the same full logits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_rank_logits, args=(r, size, port, results)) for r in range(size)]
    for worker in workers:
        worker.start()
    got = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    whole = _logits(model, _batch(0, LENGTH))
    for rank in range(size):
        torch.testing.assert_close(torch.from_numpy(got[rank]), whole, rtol=1e-4, atol=1e-4)
