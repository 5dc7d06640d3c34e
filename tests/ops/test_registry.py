"""How an op chooses between its kernels and its definition."""

from __future__ import annotations

import pytest
import torch

from wemm.errors import ParameterError
from wemm.ops.registry import Op


def _op() -> Op:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    op = Op(double, lambda inputs: {}, {})

    @op.impl("fast", device="cpu", supports=lambda x: x.numel() < 10)
    def _(x):
        return x * 2 + 100

    return op


def test_the_kernel_runs_where_it_supports_the_arguments():
    op = _op()
    with torch.inference_mode():
        assert op(torch.ones(1)).item() == 102
        assert op(torch.ones(10))[0].item() == 2


def test_with_gradients_enabled_the_definition_runs():
    x = torch.ones(1, requires_grad=True)
    y = _op()(x)
    y.backward()
    assert y.item() == 2
    assert x.grad.item() == 2


def test_a_requested_kernel_never_falls_back():
    op = _op()
    with torch.inference_mode(), op.using("fast"), pytest.raises(ParameterError, match="does not support"):
        op(torch.ones(10))
    with pytest.raises(ParameterError, match="no kernel 'faster'; loaded: definition, fast"), op.using("faster"):
        pass


def test_a_kernel_that_is_slower_here_runs_only_on_request():
    op = _op()
    op.implementations.clear()
    op.impl("slow", device="cpu", supports=lambda x: True, automatic=False)(lambda x: x * 2 + 100)
    with torch.inference_mode():
        assert op(torch.ones(1)).item() == 2
        with op.using("slow"):
            assert op(torch.ones(1)).item() == 102


def test_the_definition_can_be_requested():
    op = _op()
    with torch.inference_mode():
        with op.using("definition"):
            assert op(torch.ones(1)).item() == 2
        assert op(torch.ones(1)).item() == 102


def test_a_kernel_of_another_device_is_not_chosen():
    op = _op()
    with torch.inference_mode():
        assert op(torch.ones(1, device="meta")).device.type == "meta"
