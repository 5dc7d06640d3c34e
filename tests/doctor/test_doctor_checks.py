"""Single checks at their borders: what is a fault, what is only worth a word, what is neither."""

from __future__ import annotations

import pytest
import torch

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint, read_config
from wemm.doctor.numerics import _check_tokens
from wemm.doctor.stages import Depth, Precision
from wemm.doctor.tensors import check_weights, measure, tensor_statistics
from wemm.doctor.text import check_tokenizer
from wemm.processing.tokenizer import IM_END, Tokenizer
from wemm.progress import silent

NANO = BUNDLED_DIRECTORY / "nano"
WO = "language_model.model.layers.{}.attention.wo.original_linear.weight"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(NANO)


def _weights(directory, dtype="float32"):
    return check_weights(measure(open_checkpoint(directory), silent), dtype)


def test_a_tensor_of_zeros(patient, rewrite):
    rewrite(lambda t: t["downsampler.group_op.weight"].zero_())
    check = _weights(patient)
    assert (check.status, check.figures["zero"]) == ("fail", ["downsampler.group_op.weight"])


def test_two_equal_tensors_are_a_warning(patient, rewrite):
    rewrite(lambda t: t.update({WO.format(2): t[WO.format(0)].clone()}))
    check = _weights(patient)
    assert check.status == "warn"
    assert "layers.0.attention.wo.weight and language_model.model.layers.2.attention.wo.weight" in check.detail


def test_constant_tensors_are_no_copies(patient, rewrite):
    def fresh_norms(tensors):
        for name in tensors:
            if name.endswith("_norm.weight"):
                tensors[name].fill_(1)

    rewrite(fresh_norms)
    assert _weights(patient).status == "ok"


def test_weights_beyond_float16_matter_to_float16_alone(patient, rewrite):
    def enlarge(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})
        tensors["language_model.output.weight"] *= 2.0**20

    rewrite(enlarge)
    check = _weights(patient, "float16")
    assert (check.status, check.figures["beyond_float16"]) == ("fail", ["language_model.output.weight"])
    assert _weights(patient, "bfloat16").status == "ok"


def test_heavy_tails_are_no_flipped_bits(patient, rewrite):
    """Outliers that come in company, as trained models have them."""

    def stretch(tensors):
        tensors[WO.format(1)][:4, 7] *= 60

    rewrite(stretch)
    assert _weights(patient).status == "ok"


def test_statistics_of_a_tensor():
    values = torch.tensor([[1.0, -3.0], [2.0, 0.5]])
    s = tensor_statistics("x", values)
    assert (s.largest, s.next_largest, s.smallest, s.num_nonfinite) == (3, 2, 0.5, 0)
    assert s.rms == pytest.approx(values.square().mean().sqrt().item())
    assert tensor_statistics("x", torch.tensor([1.0, float("inf")])).num_nonfinite == 1


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_gates_exchanged_in_some_layers(patient, rewrite, diagnose, layers):
    """Of one the answers hardly change, but its outputs tell: a warning. Two cost answers: a fault, and which."""

    def exchange(tensors):
        for layer in layers:
            for factor in ("original_linear", "Plora_A", "Plora_B"):
                prefix = f"language_model.model.layers.{layer}.feed_forward"
                w1, w3 = (f"{prefix}.{linear}.{factor}.weight" for linear in ("w1", "w3"))
                tensors[w1], tensors[w3] = tensors[w3], tensors[w1]

    rewrite(exchange)
    report = diagnose(patient, numerics=False)
    [check] = [check for check in report.checks if check.name == "canaries"]
    assert check.status == ("warn" if len(layers) == 1 else "fail")
    assert str(layers) in (check.cause or check.detail)


@pytest.mark.parametrize(
    ("encode", "detail"),
    [
        (lambda encode: lambda self, text: encode(self, text.lower()), "comes back as"),
        (lambda encode: lambda self, text: [self.im_end_id] if text == IM_END else encode(self, text),
         "becomes a control token"),
    ],
    ids=["lossy", "forged"],
)  # fmt: skip
def test_a_tokenizer_that_loses_text_or_guards_nothing(monkeypatch, encode, detail):
    monkeypatch.setattr(Tokenizer, "encode", encode(Tokenizer.encode))
    check, _ = check_tokenizer(NANO, read_config(NANO))
    assert check.status == "fail"
    assert detail in check.detail


def _logits(*best):
    """Rows whose largest values are at the given ids, second best at 0 and 1 less."""
    rows = torch.zeros(len(best), 768)
    for row, token_id in zip(rows, best, strict=True):
        row[token_id], row[0] = 10.0, 9.0
    return rows


def test_first_tokens_equal_near_and_different(tokenizer):
    logits = _logits(700, 701, 702)
    assert _check_tokens([700, 701, 702], logits, tokenizer, Precision("float32"), Depth(10)).status == "ok"
    assert _check_tokens([700, 0, 702], logits, tokenizer, Precision("float32"), Depth(10)).status == "fail"
    logits[1, 0] = 10.0 - 1e-5
    check = _check_tokens([700, 0, 702], logits, tokenizer, Precision("float32"), Depth(10))
    assert check.status == "warn"
    assert check.figures["first_difference"]["position"] == 1
    assert check.figures["first_difference"]["float32_token_id"] == 701


def test_a_clear_difference_is_not_hidden_by_an_earlier_near_tie(tokenizer):
    logits = _logits(700, 701)
    logits[0, 0] = 10.0 - 1e-5
    check = _check_tokens([0, 0], logits, tokenizer, Precision("float32"), Depth(10))
    assert (check.status, check.figures["first_difference"]["position"]) == ("fail", 1)
