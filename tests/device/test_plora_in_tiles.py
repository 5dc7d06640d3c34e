"""PLoRA as vLLM's graphs run it on GPUs, against the op's definition."""

from __future__ import annotations

import pytest
import torch

from wemm.ops.add_plora import add_plora

pytestmark = pytest.mark.device
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _on_a_gpu(request):
    if request.config.getoption("--dry-run"):
        pytest.skip("compiled for GPUs alone")


def _case(num_tokens, dtype, in_size=320, sizes=(200, 136), ranks=(24, 40), images="some"):
    generator = torch.Generator("cuda").manual_seed(num_tokens)

    def normal(*shape):
        values = torch.randn(shape, generator=generator, device="cuda") * shape[-1] ** -0.5
        return values.to(dtype)

    x, y = normal(num_tokens, in_size), normal(num_tokens, sum(sizes))
    a = normal(sum(ranks), in_size)
    b = [normal(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
    is_image = (
        torch.rand(num_tokens, generator=generator, device="cuda") < {"some": 0.5, "none": 0, "all": 1}[images]
    )
    return y, x, a, b, is_image


def _defined(y, x, a, b, is_image):
    y, rows = y.clone(), is_image.nonzero().squeeze(-1)
    sizes, ranks = [f.shape[0] for f in b], [f.shape[1] for f in b]
    for part, low, high in zip(y.split(sizes, 1), a.split(ranks), b, strict=True):
        add_plora.definition(part, x, low, high, 1.0, rows)
    return y


@pytest.mark.parametrize("images", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 17, 300])
def test_equals_the_definition_and_leaves_text_alone(num_tokens, dtype, images):
    from wemm.integrations.vllm.plora_triton import add_plora_in_tiles

    y, x, a, b, is_image = _case(num_tokens, dtype, images=images)
    before, expected = y.clone(), _defined(y, x, a, b, is_image)
    add_plora_in_tiles(y, x, a, b, is_image)
    assert torch.equal(y[~is_image], before[~is_image])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_a_graph_follows_the_mask():
    from wemm.integrations.vllm.plora_triton import add_plora_in_tiles

    y, x, a, b, is_image = _case(64, torch.float32)
    start, mask = y.clone(), torch.zeros_like(is_image)
    add_plora_in_tiles(y, x, a, b, mask)  # compiled outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_plora_in_tiles(y, x, a, b, mask)
    for now in (is_image, torch.zeros_like(is_image), ~is_image):
        mask.copy_(now)
        y.copy_(start)
        graph.replay()
        torch.testing.assert_close(y, _defined(start, x, a, b, now), rtol=1e-5, atol=1e-5)
