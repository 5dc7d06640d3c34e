"""Logits and sampling parameters → tokens and log probabilities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from wemm.engine.sequence import Sequence
from wemm.request import SamplingParams


@dataclass(frozen=True)
class SampledToken:
    """One chosen token. Log probabilities are those of the model, before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most probable."""
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, if they were asked for."""


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: list[Sequence | None]) -> list[SampledToken | None]:
    """Choose one token per row. logits: float32 [num_seqs, vocab_size], row i for sequences[i].

    None stands for a row that draws nothing: its prompt is not computed to the end yet.
    """
    rows = [i for i, sequence in enumerate(sequences) if sequence is not None]
    drawn = _sample(logits[rows], [sequence for sequence in sequences if sequence is not None]) if rows else []
    tokens: list[SampledToken | None] = [None] * len(sequences)
    for i, token in zip(rows, drawn, strict=True):
        tokens[i] = token
    return tokens


def _sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[SampledToken]:
    chosen = torch.stack([_choose(row, sequence) for row, sequence in zip(logits, sequences, strict=True)])
    if all(sequence.params.logprobs is None for sequence in sequences):
        return [SampledToken(token_id, 0.0, 0, ()) for token_id in chosen.tolist()]
    logprobs = logits.log_softmax(dim=-1)
    picked = logprobs.gather(1, chosen.unsqueeze(1))
    ranks = (logprobs > picked).sum(dim=1) + 1
    most = max(sequence.params.logprobs or 0 for sequence in sequences)
    values, ids = logprobs.topk(most, dim=-1)
    sampled = []
    rows = zip(chosen.tolist(), picked[:, 0].tolist(), ranks.tolist(), ids.tolist(), values.tolist(), strict=True)
    for sequence, (token_id, logprob, rank, top_ids, top_values) in zip(sequences, rows, strict=True):
        count = sequence.params.logprobs or 0
        top = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        sampled.append(SampledToken(token_id, logprob, rank, top))
    return sampled


def _choose(logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    params = sequence.params
    logits = apply_penalties(logits, sequence.request.prompt.token_ids, sequence.output_token_ids, params)
    if params.greedy:
        return logits.argmax()
    probs = filtered_probs(logits, params)
    # Dividing by exponential noise and taking the largest draws from the distribution. The noise
    # comes from the sequence's own generator: the same on every device and in every batch.
    noise = torch.from_numpy(sequence.generator.standard_exponential(probs.shape[0], dtype=np.float32))
    return (probs / noise.clamp_min(1e-30).to(probs.device)).argmax()


def apply_penalties(
    logits: torch.Tensor,
    prompt_token_ids: Iterable[int],
    output_token_ids: Iterable[int],
    params: SamplingParams,
) -> torch.Tensor:
    """Logits [vocab_size] after repetition, presence and frequency penalties; image positions do not count."""
    repeats = params.repetition_penalty != 1
    if repeats:
        seen = _ids([*prompt_token_ids, *output_token_ids], logits).unique()
        values = logits[seen]
        penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        logits = logits.index_copy(0, seen, penalised)
    if params.presence_penalty or params.frequency_penalty:
        counts = torch.bincount(_ids(output_token_ids, logits), minlength=logits.shape[0])
        logits = logits - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    return logits


def _ids(token_ids: Iterable[int], like: torch.Tensor) -> torch.Tensor:
    vocab_size = like.shape[0]
    return torch.tensor([i for i in token_ids if 0 <= i < vocab_size], dtype=torch.int64, device=like.device)


def filtered_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [vocab_size] after temperature, then min_p, top_k and top_p; not renormalised."""
    # Subtracting the maximum first keeps tiny temperatures finite.
    probs = ((logits - logits.max()) / params.temperature).softmax(dim=-1)
    if params.min_p > 0:
        probs = probs.where(probs >= params.min_p * probs.max(), 0.0)
    if 0 < params.top_k < probs.shape[0]:
        probs = probs.where(probs >= probs.topk(params.top_k).values[-1], 0.0)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(0) - ordered
        ordered = ordered.where(before < params.top_p * ordered.sum(), 0.0)
        probs = torch.zeros_like(probs).index_copy(0, order, ordered)
    return probs
