"""Does the model make sense of pictures, and if not, which single mistake would explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wemm.checkpoint.checkpoint import Checkpoint
from wemm.cost import count_parameters
from wemm.doctor.canaries import CANARIES, Gate, Score, Scorer, watching_gates
from wemm.doctor.check import FAIL, OK, WARN, Check
from wemm.doctor.counterfactuals import (
    GAIN_NATS,
    Counterfactual,
    candidates,
    exchanged_gates,
    explains,
    try_out,
    without_plora,
)
from wemm.doctor.reference import SMALL, Reference
from wemm.doctor.tensors import stated_elsewhere
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar

_CHANCE = 0.5
"""Of ln(vocab_size) per token: worse is no reading."""
_UNSURE = 0.25
# A model in words of its own is surprised by a bare answer; beyond this a search is worth minutes.
_SUSPICIOUS_NATS = 1.0
# SiLU gates of trained models are mostly closed: their inputs lie below zero, those of the other factor about it.
_GATE_SHIFT = -0.25
_GATE_DISTANCE = 0.2
# Nats over all canaries by which PLoRA must change them.
_EFFECT = 1e-3


@dataclass(frozen=True)
class Search:
    """How far to look for causes."""

    other_tokenizers: Sequence[tuple[str, Tokenizer]]
    wanted: bool
    """False: the cause is known already, or nobody waits for it."""
    thorough: bool = False


@dataclass
class _Findings:
    loaded: Score
    gates: list[Gate]
    off: Score | None = None
    tried: dict[str, float] | None = None
    best: Counterfactual | None = None


def check_sense(
    checkpoint: Checkpoint, reference: Reference, tokenizer: Tokenizer, search: Search, progress: ProgressBar
) -> Check:
    """The canaries as loaded, without PLoRA and, if they are bad, under every counterfactual."""
    scorer = Scorer(reference, checkpoint.config, tokenizer)
    with (
        progress("canaries in float32", None, "modules") as advance,
        reference.counting(advance),
        watching_gates(reference) as gates,
    ):
        findings = _Findings(scorer.score(), gates)
    if checkpoint.plora is not None and search.wanted:
        findings.off = try_out(without_plora(), reference, scorer)
    if search.wanted and _is_suspicious(findings, checkpoint, search):
        _search(findings, checkpoint, reference, scorer, search, progress)
    return _judge(findings, checkpoint)


def agrees_with_scaling(checkpoint: Checkpoint, reference: Reference, tokenizer: Tokenizer) -> bool:
    """True if the canaries prefer the scaling in force to the one that config.json states besides."""
    other = stated_elsewhere(checkpoint)
    if other is None:
        return True
    scorer = Scorer(reference, checkpoint.config, tokenizer)
    loaded = scorer.score()
    return loaded.total < try_out(Counterfactual("", "", scale=lambda _: other), reference, scorer).total


def _is_suspicious(findings: _Findings, checkpoint: Checkpoint, search: Search) -> bool:
    # No change can gain more than there is to gain.
    if findings.loaded.total <= GAIN_NATS:
        return False
    is_small = sum(count_parameters(checkpoint.specs.values()).values()) < SMALL
    return is_small or search.thorough or findings.loaded.per_token > _SUSPICIOUS_NATS


def _search(
    findings: _Findings,
    checkpoint: Checkpoint,
    reference: Reference,
    scorer: Scorer,
    search: Search,
    progress: ProgressBar,
) -> None:
    vocab_size, tried = checkpoint.config.text.vocab_size, {}
    with progress("looking for a cause", None, "hypotheses") as advance:
        for group in candidates(checkpoint, search.other_tokenizers, _suspects(findings.gates)):
            scores = {}
            for change in group:
                scores[change] = try_out(change, reference, scorer)
                tried[change.name] = round(scores[change].per_token, 4)
                advance(1)
            good = [change for change in group if explains(scores[change], findings.loaded, vocab_size)]
            if good:
                findings.best = min(good, key=lambda change: scores[change].total)
                break
    findings.tried = tried


def _judge(findings: _Findings, checkpoint: Checkpoint) -> Check:
    loaded, chance = findings.loaded, math.log(checkpoint.config.text.vocab_size)
    figures = _figures(findings, chance)
    detail = f"{len(CANARIES)} known answers cost {loaded.per_token:.3g} nats per token (chance: {chance:.1f})"
    if findings.best is not None:
        assert findings.tried is not None
        better = findings.tried[findings.best.name]
        detail += f"; {better:.3g} with {findings.best.name}"
        return Check("canaries", FAIL, detail, findings.best.cause, figures)
    turned = _turned(findings.gates)
    if len(turned) * 2 >= len(findings.gates):
        cause = exchanged_gates(_suspects(findings.gates))
        return Check("canaries", FAIL, f"{detail}; w3 gates and w1 does not", cause, figures)
    if findings.off is not None and abs(findings.off.total - loaded.total) < _EFFECT:
        cause = "PLoRA has no effect on image tokens: its factors or its scaling are (nearly) zero"
        return Check("canaries", FAIL, f"{detail}, the same without PLoRA", cause, figures)
    if loaded.per_token > _CHANCE * chance and checkpoint.plora is None:
        cause = "PLoRA is turned off: run without --no-plora"
        return Check("canaries", FAIL, f"{detail}: not read", cause, figures)
    if loaded.per_token > _CHANCE * chance:
        cause = (
            "random weights, or weights or a tokenizer of another model: no single mistake that is known here "
            "explains the answers; fetch the checkpoint again, tokenizer.model included"
        )
        return Check("canaries", FAIL, f"{detail}: no better than guessing", cause, figures)
    if turned:
        return Check("canaries", WARN, f"{detail}; w1 and w3 look exchanged in layers {turned}", figures=figures)
    if loaded.per_token > _UNSURE * chance:
        return Check("canaries", WARN, f"{detail}: unsure of them", figures=figures)
    return Check("canaries", OK, detail, figures=figures)


def _turned(gates: Sequence[Gate]) -> list[int]:
    """Layers whose w3 behaves like a gate and whose w1 does not."""
    return [i for i, gate in enumerate(gates) if _is_gate(gate.w3, beside=gate.w1)]


def _suspects(gates: Sequence[Gate]) -> list[int]:
    """Of those, where other layers show that not all are exchanged."""
    some_are_right = any(_is_gate(gate.w1, beside=gate.w3) for gate in gates)
    return _turned(gates) if some_are_right else []


def _is_gate(shift: float, beside: float) -> bool:
    return shift < _GATE_SHIFT and beside > shift + _GATE_DISTANCE


def _figures(findings: _Findings, chance: float) -> dict[str, Any]:
    answers = zip(CANARIES, findings.loaded.losses, strict=True)
    return {
        "nats_per_token": findings.loaded.per_token,
        "chance": chance,
        "answers": [{"question": c.question, "answer": c.answer, "nats": loss} for c, loss in answers],
        "without_plora": findings.off.per_token if findings.off else None,
        "gates": [{"w1": gate.w1, "w3": gate.w3} for gate in findings.gates],
        "counterfactuals": findings.tried,
    }
