"""What if: one change to the weights, the scaling or the tokenizer, and the canaries scored again.

Both sides of a comparison of dtypes share a fault of the files. This finds it by undoing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from wemm.checkpoint.checkpoint import Checkpoint
from wemm.checkpoint.weight_map import plora_linears
from wemm.config import TextConfig
from wemm.doctor.canaries import Score, Scorer
from wemm.doctor.reference import Edit, Read, Reference
from wemm.doctor.tensors import stated_elsewhere
from wemm.processing.tokenizer import Tokenizer

# A change explains the canaries if it makes the right answers e**3 (20 times) more probable, leaves at most half
# of the surprise, and what is left is clearly better than chance: to be less bad is no explanation.
GAIN_NATS = 3.0
_REMAINDER = 0.5
_SHARE_OF_CHANCE = 0.25
_FACTORS = tuple(2.0**power for power in range(-6, 7))


@dataclass(frozen=True)
class Counterfactual:
    """One change, and what it means if it helps."""

    name: str
    cause: str
    edit: Edit = lambda name, read: read(name)
    scale: Callable[[float], float] | None = None
    tokenizer: Tokenizer | None = None


def try_out(change: Counterfactual, reference: Reference, scorer: Scorer) -> Score:
    """The canaries under a change."""
    with reference.editing(change.edit, change.scale):
        return scorer.score(change.tokenizer)


def explains(changed: Score, loaded: Score, vocab_size: int) -> bool:
    """True if a change is a better account of the files than the files themselves."""
    gain = loaded.total - changed.total
    good = changed.per_token < _SHARE_OF_CHANCE * math.log(vocab_size)
    return good and gain > GAIN_NATS and changed.total < _REMAINDER * loaded.total


def candidates(
    checkpoint: Checkpoint, other_tokenizers: Sequence[tuple[str, Tokenizer]], suspects: Sequence[int] = ()
) -> Iterator[list[Counterfactual]]:
    """Changes in groups, the usual mistakes first: the search ends behind a group that holds an explanation.

    `suspects` are layers whose w1 and w3 look exchanged.
    """
    yield [*_exchanged_gates(), *(_exchanged_gates(suspects) if suspects else ())]
    yield _repacked(checkpoint.config.text)
    if checkpoint.plora is not None:
        yield _scalings(checkpoint)
    yield [
        Counterfactual(
            f"tokenizer of {name}",
            f"tokenizer.model is not this model's: that of {name!r} fits; fetch tokenizer.model of the same "
            "checkpoint",
            tokenizer=tokenizer,
        )
        for name, tokenizer in other_tokenizers
    ]
    yield _exchanged_groups(checkpoint.config.text)


def without_plora() -> Counterfactual:
    """What is left without the update."""
    return Counterfactual(
        "PLoRA off", "PLoRA does harm: its factors belong to another checkpoint", scale=lambda s: 0
    )


def exchanged_gates(layers: Sequence[int] = ()) -> str:
    """The cause, in words."""
    where = f"decoder layers {list(layers)}" if layers else "every decoder layer"
    return (
        f"w1 and w3 (gate and up projection) are exchanged in {where}: convert the checkpoint again without "
        "exchanging them"
    )


def _exchanged_gates(layers: Sequence[int] = ()) -> list[Counterfactual]:
    """In these layers, or in all."""

    def exchange(name: str, read: Read) -> torch.Tensor:
        chosen = not layers or any(f".layers.{layer}." in name for layer in layers)
        for own, other in ((".feed_forward.w1.", ".feed_forward.w3."), (".feed_forward.w3.", ".feed_forward.w1.")):
            if chosen and own in name:
                return read(name.replace(own, other))
        return read(name)

    name = f"w1 and w3 exchanged{f' in layers {list(layers)}' if layers else ''}"
    return _with_and_without_plora(name, exchanged_gates(layers), exchange)


def _with_and_without_plora(name: str, cause: str, edit: Edit) -> list[Counterfactual]:
    """The factors of PLoRA may have been written by another hand than the weights."""

    def base_only(name: str, read: Read) -> torch.Tensor:
        return read(name) if ".Plora_" in name else edit(name, read)

    return [Counterfactual(name, cause, edit), Counterfactual(f"{name}, PLoRA as it is", cause, base_only)]


def _repacked(text: TextConfig) -> list[Counterfactual]:
    changes = []
    for layout, order in _layouts(text).items():
        cause = (
            f"the rows of wqkv lie in another order than InternLM2's ({layout}): pack them per KV group, its "
            "queries, its key, its value"
        )
        changes += _with_and_without_plora(f"wqkv: {layout}", cause, _reorder(order))
    return changes


def _layouts(text: TextConfig) -> dict[str, torch.Tensor]:
    """How the rows may lie in the file → index of file rows that puts them right. int64 [wqkv_out]."""
    groups, head = text.num_key_value_heads, text.head_dim
    heads = text.num_attention_heads // groups
    rows = torch.arange(text.wqkv_out).view(groups, heads + 2, head)
    queries = torch.arange(groups * heads * head).view(groups, heads, head)
    keys = torch.arange(groups * head).view(groups, 1, head) + queries.numel()
    blocks = torch.cat([queries, keys, keys + keys.numel()], dim=1)  # as if the file held [Q | K | V]
    order = [*range(heads), heads + 1, heads]
    halves = torch.arange(head).view(2, head // 2).T.flatten()
    rotated = rows.clone()
    rotated[:, : heads + 1] = rows[:, : heads + 1, halves.argsort()]
    return {
        "all queries, then all keys, then all values": blocks.flatten(),
        "packed per KV group twice": blocks.flatten().argsort(),
        "value before key": rows[:, order].flatten(),
        "key and value before the queries": rows.roll(-2, 1).flatten(),
        "KV groups in reverse": rows.flip(0).flatten(),
        "KV groups rotated by one": rows.roll(-1, 0).flatten(),
        "KV groups rotated back by one": rows.roll(1, 0).flatten(),
        "rotary halves interleaved": rotated.flatten(),
        "rotary halves separated twice": rotated.flatten().argsort(),
    }


def _reorder(order: torch.Tensor) -> Edit:
    def reorder(name: str, read: Read) -> torch.Tensor:
        value = read(name)
        is_rows = name.endswith((".wqkv.weight", ".wqkv.Plora_B.weight"))
        return value[order.to(value.device)] if is_rows else value

    return reorder


def _exchanged_groups(text: TextConfig) -> list[Counterfactual]:
    """The last resort: any two KV groups."""
    groups = text.num_key_value_heads
    changes = []
    for a, b in combinations(range(groups), 2):
        rows = torch.arange(text.wqkv_out).view(groups, -1)
        rows[[a, b]] = rows[[b, a]]
        cause = f"KV groups {a} and {b} of wqkv are exchanged in every decoder layer: convert the checkpoint again"
        changes += _with_and_without_plora(f"wqkv: groups {a} and {b} exchanged", cause, _reorder(rows.flatten()))
    return changes


def _scalings(checkpoint: Checkpoint) -> list[Counterfactual]:
    plora = checkpoint.plora
    assert plora is not None
    linear = plora_linears(checkpoint.config)[0]
    scaling, rank = plora.scaling(linear), plora.rank(linear)
    alpha = scaling * (math.sqrt(rank) if plora.use_rslora else rank)
    named = {1.0, alpha / rank, alpha / math.sqrt(rank), rank / alpha, alpha, 1 / alpha}
    stated = stated_elsewhere(checkpoint)
    if stated is not None:
        named.add(stated)
    wanted = sorted({round(value / scaling, 9) for value in named} | set(_FACTORS))
    source = Path(plora.source).name
    return [without_plora()] + [
        Counterfactual(
            f"PLoRA scaling {scaling * factor:g}",
            f"the PLoRA scaling {scaling:g} is wrong, {scaling * factor:g} fits the weights: set lora_alpha to "
            f"{alpha * factor:g} in {source}",
            scale=_times(factor),
        )
        for factor in wanted
        if not math.isclose(factor, 1, rel_tol=1e-6)
    ]


def _times(factor: float) -> Callable[[float], float]:
    return lambda scaling: scaling * factor
