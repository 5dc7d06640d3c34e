"""Trains `nano` from nothing, on the engine's own modules: the definitions of its ops have gradients.

python -m training.train RUN_DIRECTORY --steps 9000

A run can be killed and started again with the same command: it goes on from its last saved state and
ends with the same weights. Progress goes to RUN_DIRECTORY/log.jsonl.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from training.dataset import BLOCK_SIZE, PATCH_LABELS, PATCHES_PER_STEP, TrainingData, TrainingStep
from training.tasks import TASKS
from wemm.checkpoint.adapter import configured_plora
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, read_config
from wemm.config import ModelConfig
from wemm.layers.plora import ColumnParallelPloraLinear, RowParallelPloraLinear
from wemm.model.wemm import WemmModel
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import terminal_bar

NANO = BUNDLED_DIRECTORY / "nano"
_MUON_LR, _ADAM_LR = 3e-3, 2e-3
_WEIGHT_DECAY = 0.01
_WARM_UP_STEPS = 100
_DECAY_FROM, _LAST_LR = 0.55, 0.02
_CLIP = 1.0
_BACKGROUND_WEIGHT = 0.2
_SAVE_EVERY = 500
_LOG_EVERY = 50
_CHECK_EVERY = 1000
_CHECK_STEPS = 10
_CHECK_SEED = 10_001
_STATE = "state.pt"


class Trainee(nn.Module):
    """The model, and a head that says what each patch shows: the tower learns from it, then it goes."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.model = WemmModel(config, configured_plora(NANO, config))
        self.patch_head = nn.Linear(config.vision.hidden_size, len(PATCH_LABELS) + 1)
        self._cache_shape = (config.text.num_key_value_heads, config.text.head_dim)
        self._num_layers = config.text.num_hidden_layers
        initialise(self.model, config, seed)
        for module in self.model.language_model.modules():
            if isinstance(module, ColumnParallelPloraLinear | RowParallelPloraLinear):
                let_text_teach(module)
        weights = torch.ones(len(PATCH_LABELS) + 1)
        weights[0] = _BACKGROUND_WEIGHT
        self.register_buffer("_label_weights", weights, persistent=False)

    def forward(self, step: TrainingStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the answers [num_targets, vocab_size] and of the patches [num_patches, num_labels]."""
        features = self.model.vision_tower(step.images)
        grids = step.images.patch_grids[: step.num_images_asked]
        asked = features[: sum(rows * columns for rows, columns in grids)]
        visual = torch.cat(self.model.visual_embeds(asked, grids))
        batch = replace(step.batch, visual_embeds=visual[step.visual_rows])
        num_blocks = batch.block_tables.numel()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else visual.dtype
        cache = visual.new_zeros(self._num_layers, 2, num_blocks, BLOCK_SIZE, *self._cache_shape, dtype=dtype)
        return self.model.compute_logits(self.model(batch, cache)), self.patch_head(features)

    def losses(self, step: TrainingStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy of answer tokens, and of patches.

        A token weighs 1/sqrt(length of its answer): "yes" must not drown among descriptions.
        """
        answers, patches = self(step)
        weights = step.target_answers.bincount()[step.target_answers].rsqrt()
        per_token = F.cross_entropy(answers, step.targets, reduction="none")
        answer_loss = (per_token * weights).sum() / weights.sum()
        labels: Any = self._label_weights
        return answer_loss, F.cross_entropy(patches.float(), step.patch_labels, labels)


class _TaughtByText(torch.autograd.Function):
    """y, the product of x with a weight outside the graph; the weight's gradient is that of text rows."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor, is_text: torch.Tensor) -> Any:
        ctx.save_for_backward(x.to(y.dtype), is_text)
        ctx.dtype = weight.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, is_text = ctx.saved_tensors
        return (grad[is_text].T @ x[is_text]).to(ctx.dtype), None, grad, None


def let_text_teach(linear: nn.Module) -> None:
    """Image rows teach a linear's PLoRA only, as where PLoRA is added to a language model that is kept.

    Trained on image rows too, the base learns to read them, and little is lost without PLoRA.
    """

    def keep(module: nn.Module, _: Any) -> None:
        module.weight.requires_grad_(False)

    def teach(module: nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], y: torch.Tensor) -> torch.Tensor:
        x, image_rows = inputs
        module.weight.requires_grad_(True)
        is_text = torch.ones(len(x), dtype=torch.bool).index_fill(0, image_rows, False)
        apply: Any = _TaughtByText.apply
        return apply(module.weight, x.detach(), y, is_text)

    linear.register_forward_pre_hook(keep)
    linear.register_forward_hook(teach)


def initialise(model: WemmModel, config: ModelConfig, seed: int) -> None:
    """Random weights: wide ones, residual branches damped, sine and cosine in the position table."""
    generator = torch.Generator().manual_seed(seed)
    damped = {
        **dict.fromkeys(("out_proj", "fc2"), (2 * config.vision.num_hidden_layers) ** -0.5),
        **dict.fromkeys(("wo", "w2"), (2 * config.text.num_hidden_layers) ** -0.5),
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            *_, module, kind = name.split(".")
            if parameter.dim() == 1:
                parameter.fill_(1.0 if kind == "weight" else 0.0)
                continue
            fan_in = parameter[0].numel()
            scale = 0.7 * fan_in**-0.5 * damped.get(module, 1.0)
            if kind == "weight" and module in ("tok_embeddings", "separator_embedding"):
                scale = 0.3
            parameter.normal_(0.0, scale, generator=generator)
        table = model.vision_tower.embeddings.position_embedding.weight
        table.copy_(0.5 * _sine_cosine(config.vision.position_grid, table.shape[1]))


def _sine_cosine(side: int, width: int) -> torch.Tensor:
    frequencies = math.pi * torch.logspace(0, math.log2(side / 2), width // 4, base=2)
    angles = torch.arange(side)[:, None] / side * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(side * side, -1)


def make_optimizers(trainee: Trainee) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        in_block = ".layers." in name and parameter.dim() == 2 and "plora" not in name
        (matrices if in_block else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=_ADAM_LR, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY, fused=True),
    ]


def learning_rate(step: int, num_steps: int) -> float:
    """Factor: a short warm-up, constant, then linear down to `_LAST_LR`."""
    progress = step / num_steps
    decay = max(0.0, (progress - _DECAY_FROM) / (1 - _DECAY_FROM))
    return min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - (1 - _LAST_LR) * decay)


def train(
    directory: Path,
    num_steps: int,
    seed: int = 0,
    threads: int = 2,
    until: int | None = None,
    patches_per_step: int = PATCHES_PER_STEP,
    tower_from: Path | None = None,
) -> Trainee:
    """Train to the end, or `until` a step; goes on from the state saved in the directory.

    The vision tower begins as that of the run in `tower_from`, or untrained.
    """
    torch.set_num_threads(threads)
    # The fused attention of the CPU is slow at short lengths when gradients are wanted.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    config, tokenizer = read_config(NANO), Tokenizer(NANO)
    torch.manual_seed(seed)
    trainee = Trainee(config, seed)
    optimizers = make_optimizers(trainee)
    directory.mkdir(parents=True, exist_ok=True)
    state_file, log_file = directory / _STATE, directory / "log.jsonl"
    if tower_from is not None:
        _take_tower(tower_from / _STATE, trainee)
    first = _restore(state_file, trainee, optimizers)
    _truncate_log(log_file, first)
    last = min(num_steps, until or num_steps)
    data = TrainingData(config, tokenizer, num_steps, seed, patches_per_step, tower_from is not None)
    loader = DataLoader(data, batch_size=None, sampler=range(first, last), num_workers=1, prefetch_factor=8)
    recent: dict[str, float] = defaultdict(float)
    started = time.monotonic()
    with (
        terminal_bar("training", num_steps, "steps") as advance,
        log_file.open("a", encoding="utf-8") as log,
        sdpa_kernel(SDPBackend.MATH),
    ):
        advance(first)
        for number, step in enumerate(loader, first):
            factor = learning_rate(number, num_steps)
            for key, value in _optimise(trainee, optimizers, step, factor).items():
                recent[key] += value
            done = number + 1
            if done % _LOG_EVERY == 0 or done == last:
                images, count = recent.pop("images"), recent.pop("steps")
                line = {key: round(value / count, 4) for key, value in recent.items()}
                seconds = time.monotonic() - started
                line |= {"step": done, "lr": round(factor, 4), "images_per_s": round(images / seconds, 1)}
                if done % _CHECK_EVERY == 0 or done == num_steps:
                    line |= check(trainee, config, tokenizer)
                log.write(json.dumps(line) + "\n")
                log.flush()
                recent.clear()
                started = time.monotonic()
            if done % _SAVE_EVERY == 0 or done == last:
                _save(state_file, trainee, optimizers, done)
            advance(1)
    return trainee


def _optimise(
    trainee: Trainee, optimizers: list[torch.optim.Optimizer], step: TrainingStep, factor: float
) -> dict[str, float]:
    for optimizer, rate in zip(optimizers, (_MUON_LR, _ADAM_LR), strict=True):
        optimizer.param_groups[0]["lr"] = rate * factor
        optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        answer_loss, patch_loss = trainee.losses(step)
    (answer_loss + patch_loss).backward()
    nn.utils.clip_grad_norm_(trainee.parameters(), _CLIP)
    for optimizer in optimizers:
        optimizer.step()
    return {
        "answer_loss": answer_loss.item(),
        "patch_loss": patch_loss.item(),
        "images": len(step.images.patch_grids),
        "steps": 1,
    }


@torch.no_grad()
def check(trainee: Trainee, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, float]:
    """Share of new questions answered right as a whole, per task; and of glyph and shape patches."""
    right: dict[str, list[bool]] = defaultdict(list)
    shown, named = 0, 0
    # Steps from the end of the curriculum: full difficulty.
    data = TrainingData(config, tokenizer, 2 * _CHECK_STEPS, _CHECK_SEED)
    for number in range(_CHECK_STEPS, 2 * _CHECK_STEPS):
        step = data[number]
        with torch.autocast("cpu", torch.bfloat16):
            answers, patches = trainee(step)
        wrong = set(step.target_answers[answers.argmax(-1) != step.targets].tolist())
        for i, question in enumerate(step.questions):
            right[question.task].append(i not in wrong)
        marked = step.patch_labels > 0
        shown += int(marked.sum())
        named += int((patches.argmax(-1) == step.patch_labels)[marked].sum())
    shares = {task: round(sum(right[task]) / max(1, len(right[task])), 4) for task in TASKS}
    return {**shares, "patches": round(named / shown, 4)}


def _save(path: Path, trainee: Trainee, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    state = {
        "step": step,
        "trainee": trainee.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _restore(path: Path, trainee: Trainee, optimizers: list[torch.optim.Optimizer]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    trainee.load_state_dict(state["trainee"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def _take_tower(path: Path, trainee: Trainee) -> None:
    parts = ("model.vision_tower.", "patch_head.")
    state = torch.load(path, weights_only=True)["trainee"]
    trainee.load_state_dict({**trainee.state_dict(), **{k: v for k, v in state.items() if k.startswith(parts)}})


def _truncate_log(path: Path, step: int) -> None:
    """Drop what was logged after the state that the run goes on from."""
    if path.exists():
        lines = [line for line in path.read_text("utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _main(
    directory: Annotated[Path, typer.Argument(help="Where the run keeps its state and log.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps of the whole run.")] = 9000,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of torch; one more process makes the data.")] = 2,
    until: Annotated[int | None, typer.Option(help="Stop here; the schedule stays that of --steps.")] = None,
    tower_from: Annotated[Path | None, typer.Option(help="Run whose vision tower to begin with.")] = None,
) -> None:
    """Train nano, or go on with a run that was stopped."""
    train(directory, steps, seed, threads, until, tower_from=tower_from)


if __name__ == "__main__":
    typer.run(_main)
