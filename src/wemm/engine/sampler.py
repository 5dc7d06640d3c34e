"""Logits and sampling parameters → tokens and log probabilities, for all rows of a step together.

Every random number is a hash of the request's seed, the answer's index, the position and the token id.
So a draw depends on nothing else: not on the batch, on steps taken before, on drafts or the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wemm.ops.keep_top_p import keep_top_p
from wemm.platforms.transfer import HostCopy, to_device
from wemm.request import SamplingParams

_UINT64 = 2**64 - 1
# splitmix64 (Steele, Lea and Flood 2014): increment, then two multiply-xorshift rounds.
_INCREMENT, _FACTOR_1, _FACTOR_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MANTISSA_BITS = 23


@dataclass(frozen=True)
class SamplingRow:
    """What the token behind one row of logits depends on besides them."""

    params: SamplingParams
    seed: int
    index: int
    """Which of the request's n answers."""
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """The answer before this token, drafts included, as far as it is known."""
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that would end the answer."""
    allowed: torch.Tensor | None = None
    """bool [vocab_size], what a grammar permits; None: everything."""
    pending_token_id: torch.Tensor | None = None
    """int64 [1] on the device: the answer's last token where only the device knows it."""

    @property
    def position(self) -> int:
        """Tokens of the answer before this one."""
        return len(self.output_token_ids) + (self.pending_token_id is not None)


@dataclass(frozen=True)
class SampledToken:
    """One chosen token. Log probabilities are those of the model, before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most probable."""
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, if they were asked for."""


class Draws:
    """The tokens of a step: at once on the device, where the next step reads them, and later here."""

    def __init__(self, token_ids: torch.Tensor, logprobs: _Logprobs | None) -> None:
        self.token_ids = token_ids
        """int64 [num_rows]"""
        self._logprobs = logprobs
        self._token_ids = HostCopy(token_ids)

    def fetch(self) -> list[SampledToken]:
        """Wait for them."""
        token_ids = self._token_ids.wait().tolist()
        if self._logprobs is None:
            return [SampledToken(token_id, 0.0, 0, ()) for token_id in token_ids]
        return self._logprobs.fetch(token_ids)


class _Logprobs:
    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, counts: Sequence[int]) -> None:
        logprobs = logits.log_softmax(dim=-1)
        picked = logprobs.gather(1, token_ids.unsqueeze(1))
        ranks = (logprobs > picked).sum(dim=1, keepdim=True) + 1
        values, ids = logprobs.topk(min(max(counts), logits.shape[1]), dim=-1)
        # Integers and numbers come in one piece each.
        self._integers = HostCopy(torch.cat((ranks, ids), dim=1))
        self._numbers = HostCopy(torch.cat((picked, values), dim=1))
        self._counts = counts

    def fetch(self, token_ids: Sequence[int]) -> list[SampledToken]:
        integers, numbers = self._integers.wait().tolist(), self._numbers.wait().tolist()
        return [
            SampledToken(token_id, logprob, rank, tuple(zip(top_ids[:count], top_values[:count], strict=True)))
            for token_id, count, (rank, *top_ids), (logprob, *top_values) in zip(
                token_ids, self._counts, integers, numbers, strict=True
            )
        ]


@torch.inference_mode()
def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Draws:
    """Choose one token per row, without waiting for it. logits: float32 [num_rows, vocab_size]."""
    adjusted = logits
    for i, row in enumerate(rows):
        changed = adjust(logits[i], row)
        if changed is not None:
            adjusted = logits.clone() if adjusted is logits else adjusted
            adjusted[i] = changed
    token_ids = adjusted.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        at = _sent(drawn, torch.int64, logits.device)
        token_ids[at] = _draw(adjusted[at], [rows[i] for i in drawn])
    if all(row.params.logprobs is None for row in rows):
        return Draws(token_ids, None)
    return Draws(token_ids, _Logprobs(logits, token_ids, [row.params.logprobs or 0 for row in rows]))


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    probs = filtered_probs(logits, [row.params for row in rows])
    keys = [random_key(row.seed, row.index, row.position) for row in rows]
    # Dividing by exponential noise and taking the largest draws from the distribution.
    return (probs / exponential_noise(keys, probs.shape[1], probs.device)).argmax(dim=-1)


def adjust(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor | None:
    """Logits [vocab_size] after bias, penalties, min_tokens and the grammar, in this order; None: as they were."""
    params, given = row.params, logits
    if params.biases:
        ids, values = zip(*params.biases.items(), strict=True)
        bias = _sent(values, logits.dtype, logits.device)
        logits = logits.index_add(0, _sent(ids, torch.int64, logits.device), bias)
    logits = apply_penalties(logits, row)
    if row.position < params.min_tokens and row.end_token_ids:
        ends = sorted(row.end_token_ids)
        logits = logits.index_fill(0, _sent(ends, torch.int64, logits.device), -torch.inf)
    if row.allowed is not None:
        logits = logits.masked_fill(to_device(~row.allowed, logits.device), -torch.inf)
    return None if logits is given else logits


def apply_penalties(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Logits [vocab_size] after repetition, presence and frequency penalties; image positions do not count."""
    params = row.params
    if params.repetition_penalty != 1:
        counts = _counts([*row.prompt_token_ids, *row.output_token_ids], row.pending_token_id, logits)
        penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
        logits = penalised.where(counts > 0, logits)
    if params.presence_penalty or params.frequency_penalty:
        counts = _counts(row.output_token_ids, row.pending_token_id, logits)
        penalised = logits - params.presence_penalty - params.frequency_penalty * counts
        logits = penalised.where(counts > 0, logits)
    return logits


def _counts(token_ids: Iterable[int], pending: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """How often each token of the vocabulary comes: int64 [vocab_size]."""
    # Those known here are counted here: every token differs from the others then, and fewer are sent.
    known = Counter(i for i in token_ids if 0 <= i < like.shape[0])
    ids, times = _sent([[*known.keys()], [*known.values()]], torch.int64, like.device)
    counts = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device).index_copy_(0, ids, times)
    return counts if pending is None else counts.index_add_(0, pending, torch.ones_like(pending))


def filtered_probs(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities [num_rows, vocab_size] after temperature, then min_p, top_k and top_p; not renormalised."""

    def column(values: Iterable[float]) -> torch.Tensor:
        return _sent(list(values), torch.float32, device).unsqueeze(1)

    device, vocab_size = logits.device, logits.shape[1]
    # Subtracting the maximum first keeps tiny temperatures finite.
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    probs = (shifted / column(p.temperature for p in params)).softmax(dim=-1)
    if any(p.min_p > 0 for p in params):
        least = probs.amax(dim=-1, keepdim=True) * column(p.min_p for p in params)
        probs = probs.where(probs >= least, 0.0)
    limited = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if limited:
        top_ks = [params[i].top_k for i in limited]
        at, last = _sent(limited, torch.int64, device), _sent(top_ks, torch.int64, device).unsqueeze(1) - 1
        few = probs[at]
        least = few.topk(max(top_ks)).values.gather(1, last)
        probs = probs.index_copy(0, at, few.where(few >= least, 0.0))
    limited = [i for i, p in enumerate(params) if p.top_p < 1]
    if limited:
        at = _sent(limited, torch.int64, device)
        top_ps = _sent([params[i].top_p for i in limited], torch.float32, device)
        probs = probs.index_copy(0, at, keep_top_p(probs[at], top_ps))
    return probs


def _sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=dtype), device)


def random_key(seed: int, index: int, position: int) -> int:
    """64 bits for one position of one answer."""
    key = seed
    for part in (index, position):
        key = _mix((key + (part + 1) * _INCREMENT) & _UINT64)
    return key


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * _FACTOR_1) & _UINT64
    z = ((z ^ (z >> 27)) * _FACTOR_2) & _UINT64
    return z ^ (z >> 31)


def exponential_noise(keys: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """Exponentially distributed float32 [len(keys), vocab_size], a function of keys and token ids alone."""
    first = _sent([_int64(key) for key in keys], torch.int64, device).unsqueeze(1)
    z = first + torch.arange(1, vocab_size + 1, device=device) * _int64(_INCREMENT)
    z = (z ^ _shift_right(z, 30)) * _int64(_FACTOR_1)
    z = (z ^ _shift_right(z, 27)) * _int64(_FACTOR_2)
    bits = _shift_right(z ^ _shift_right(z, 31), 64 - _MANTISSA_BITS)
    # Halves between multiples of 2**-23: exact in float32, and neither 0 nor 1.
    return -((bits.to(torch.float32) + 0.5) * 2**-_MANTISSA_BITS).log()


def _shift_right(z: torch.Tensor, count: int) -> torch.Tensor:
    return (z >> count) & (2 ** (64 - count) - 1)  # torch's own shift repeats the sign


def _int64(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
