"""What a step says about its rows: which of them can be trusted."""

from __future__ import annotations

import math

import pytest
import torch

from wemm.engine.forward_pass import output_layer


class _Model:
    """Logits are twice the hidden states."""

    def compute_logits(self, hidden):
        return (2 * hidden).to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 6, 12])
def test_one_number_that_is_not_finite_condemns_its_row_alone(dtype, value, column):
    hidden = torch.linspace(-1, 1, 39, dtype=dtype).view(3, 13)
    hidden[1, column] = value
    assert output_layer(_Model(), hidden).is_finite.tolist() == [[True, True], [False, False], [True, True]]


def test_hidden_states_and_logits_are_told_apart():
    hidden = torch.ones(2, 5, dtype=torch.float16)
    hidden[0, 3] = 60_000
    forwarded = output_layer(_Model(), hidden)
    assert forwarded.is_finite.tolist() == [[True, False], [True, True]]
    assert forwarded.logits.dtype == torch.float32


def test_no_rows():
    assert output_layer(_Model(), torch.empty(0, 5)).is_finite.shape == (0, 2)
