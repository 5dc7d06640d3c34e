"""The float32 definitions over a checkpoint of any size: weights are read as a module runs, then dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wemm.checkpoint.checkpoint import Checkpoint
from wemm.cost import count_parameters
from wemm.engine.vision_encode import image_batch
from wemm.model.batch import Batch
from wemm.model.wemm import WemmModel
from wemm.ops.registry import DEFINITION, OPS
from wemm.processing.processor import ImageSpan
from wemm.progress import Advance

SMALL = 100_000_000
"""Parameters of a model whose float32 weights may stay in memory."""

Read = Callable[[str], torch.Tensor]
"""Checkpoint name of a tensor → float32."""
Edit = Callable[[str, Read], torch.Tensor]
"""What stands in for a tensor of the checkpoint: for `name`, made of whatever is read."""


@dataclass(frozen=True)
class Sample:
    """Token ids whose last logits are wanted, and the images among them."""

    token_ids: tuple[int, ...]
    image_spans: tuple[ImageSpan, ...]
    num_logits: int


class Reference:
    """A checkpoint as the definitions compute it, in float32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._edit: Edit = lambda name, read: read(name)
        self._advance: Advance = lambda num_modules: None
        self._kept: dict[str, torch.Tensor] = {}
        self._keeps = sum(count_parameters(checkpoint.specs.values()).values()) < SMALL
        with torch.device("meta"):
            self.model = WemmModel(checkpoint.config, checkpoint.plora)
        names = {spec.parameter: spec.name for spec in checkpoint.specs.values()}
        for path, module in self.model.named_modules():
            own = {name: names[f"{path}.{name}"] for name, _ in module.named_parameters(recurse=False)}
            if own:
                _stream(module, own, self._tensor, self._done)
        # Read where no module runs: in the seam between pictures and text.
        separators = next(name for name in checkpoint.specs if name.startswith("visual_source"))
        self.model.separator_embedding.weight = _parameter(self._read(separators))

    @contextmanager
    def editing(self, edit: Edit, scale: Callable[[float], float] | None = None) -> Iterator[None]:
        """Inside, the weights and the scaling of PLoRA are changed."""
        before, self._edit = self._edit, edit
        linears: list[Any] = [module for module in self.model.modules() if hasattr(module, "scaling")]
        scalings = {module: module.scaling for module in linears}
        for module, scaling in scalings.items():
            module.scaling = scale(scaling) if scale else scaling
        try:
            yield
        finally:
            self._edit = before
            for module, scaling in scalings.items():
                module.scaling = scaling

    @contextmanager
    def counting(self, advance: Advance) -> Iterator[None]:
        """Inside, every module that ran counts as one."""
        self._advance = advance
        try:
            yield
        finally:
            self._advance = lambda num_modules: None

    def visual_embeds(self, span: ImageSpan) -> torch.Tensor:
        """[num_tokens, hidden_size] of one image, separators included."""
        with _definitions():
            packed = image_batch([span.image], self._checkpoint.config.vision, self._device)
            [embeds] = self.model.visual_embeds(self.model.vision_tower(packed), packed.patch_grids)
        return embeds

    def between_separators(self, grid: torch.Tensor) -> torch.Tensor:
        """Downsampled tokens [n, hidden_size] → [n + 2, hidden_size], as the prompt holds them."""
        separators = self.model.separator_embedding.weight
        grid = grid.to(device=self._device, dtype=torch.float32)
        return torch.cat((separators[:1], grid, separators[1:2]))

    def logits(self, samples: Sequence[Sample], embeds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[num_logits, vocab_size] per sample, all in one pass; `embeds` of their images in order.

        What samples share up to the end of their images is computed once.
        """
        batch = _batch(samples, embeds, self._device)
        cache = torch.empty(self.model.kv_cache_shape(len(batch.input_ids), 1), device=self._device)
        with _definitions():
            logits = self.model.compute_logits(self.model(batch, cache))
        return list(logits.split([sample.num_logits for sample in samples]))

    @property
    def num_modules(self) -> int:
        """Modules with weights: what a full pass counts to, tower included."""
        return sum(1 for module in self.model.modules() if list(module.parameters(recurse=False)))

    def _tensor(self, name: str) -> torch.Tensor:
        return self._edit(name, self._read)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._kept:
            return self._kept[name]
        value = self._checkpoint.read(name).to(self._device)
        if self._keeps:
            self._kept[name] = value
        return value

    def _done(self) -> None:
        self._advance(1)


def _parameter(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _stream(module: Any, own: dict[str, str], read: Read, done: Callable[[], None]) -> None:
    empty = {attribute: getattr(module, attribute) for attribute in own}

    def load(*_: Any) -> None:
        for attribute, name in own.items():
            setattr(module, attribute, _parameter(read(name)))

    def drop(*_: Any) -> None:
        for attribute, parameter in empty.items():
            setattr(module, attribute, parameter)
        done()

    module.register_forward_pre_hook(load)
    module.register_forward_hook(drop)


@contextmanager
def _definitions() -> Iterator[None]:
    with torch.inference_mode(), ExitStack() as stack:
        for op in OPS.values():
            stack.enter_context(op.using(DEFINITION))
        yield


def _batch(samples: Sequence[Sample], embeds: Sequence[torch.Tensor], device: torch.device) -> Batch:
    # Blocks of one token: sequences may share any beginning.
    shared: dict[tuple[Any, ...], list[int]] = {}
    input_ids: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    rows: list[int] = []
    tables, bounds, visual = [], [0], []
    for sample, image in zip(samples, embeds, strict=True):
        stop = sample.image_spans[-1].stop if sample.image_spans else 0
        key = (sample.token_ids[:stop], *(span.image.sha256 for span in sample.image_spans))
        done = len(shared.get(key, ()))
        first_row = len(input_ids) - done
        slots = [*shared.get(key, ()), *range(len(input_ids), first_row + len(sample.token_ids))]
        if not done and stop:
            shared[key] = slots[:stop]
            rows += [first_row + i for span in sample.image_spans for i in range(span.start, span.stop)]
            visual.append(image)
        input_ids += sample.token_ids[done:]
        positions += range(done, len(sample.token_ids))
        wanted += range(len(input_ids) - sample.num_logits, len(input_ids))
        tables.append(torch.tensor(slots, dtype=torch.int32))
        bounds.append(len(input_ids))
    return Batch(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        slot_mapping=torch.arange(len(input_ids), device=device),
        block_tables=nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device),
        seq_lens=torch.tensor([len(sample.token_ids) for sample in samples], dtype=torch.int32, device=device),
        logits_rows=torch.tensor(wanted, device=device),
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device=device),
        image_rows=torch.tensor(rows, device=device) if rows else None,
        visual_embeds=torch.cat(visual) if visual else None,
    )
