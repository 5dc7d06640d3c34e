"""What the engine computed, held against the float32 definitions: ranges, stages, first tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from wemm.doctor.canaries import CANARIES
from wemm.doctor.check import FAIL, OK, SKIPPED, WARN, Check
from wemm.doctor.reference import Reference, Sample
from wemm.doctor.running import EngineRun
from wemm.doctor.stages import LOGITS, Depth, Precision, Ranges, Stage, compare, depths, observed
from wemm.doctor.tensors import FLOAT16_MAX
from wemm.processing.processor import ProcessedPrompt
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar

# Logits of two tokens, each off by its share of the row's error: four standard deviations of the difference.
_NEAR_TIE = 4 * math.sqrt(2)
_HEADROOM = 0.5
_SHOWN = 40  # characters of a text in one line


def check_numerics(
    run: EngineRun,
    prompt: ProcessedPrompt,
    reference: Reference,
    tokenizer: Tokenizer,
    precision: Precision,
    quick: bool,
    progress: ProgressBar,
) -> list[Check]:
    """The float32 side, teacher-forced with the engine's answer, and what it shows.

    `quick`: the language model only, from the engine's own picture embeddings.
    """
    depth, ranges = depths(reference.model), Ranges()
    order = list(depth)
    grid = run.recording.pop("downsampler") if quick else None
    if grid is not None and not grid.isfinite().all():
        grid = None
    stages: list[Stage] = []
    logits: list[torch.Tensor] = []

    def sink(name: str, output: torch.Tensor) -> None:
        if name == LOGITS:
            logits.append(output.to("cpu", torch.float32))
        stages.append(compare(name, run.recording.pop(name), output, precision.limit(depth[name])))

    answer = run.token_ids
    sample = Sample((*prompt.token_ids, *answer[:-1]), prompt.image_spans, max(1, len(answer)))
    with (
        progress("float32 definitions", reference.num_modules, "modules") as advance,
        reference.counting(advance),
        observed(reference.model, sink, ranges),
    ):
        if grid is not None:
            embeds = [reference.between_separators(grid)]
        else:
            embeds = [reference.visual_embeds(span) for span in prompt.image_spans]
        reference.logits([sample], [torch.cat(embeds)])
    stages.sort(key=lambda stage: order.index(stage.name))
    return [
        _check_range(run, ranges, precision.dtype),
        _check_stages(stages, precision, grid is None),
        _check_tokens(answer, logits[0], tokenizer, precision, depth[LOGITS]),
        *_check_answers(run.answers),
    ]


def _check_range(run: EngineRun, ranges: Ranges, dtype: str) -> Check:
    place, wrong = run.ranges.first_nonfinite, ranges.first_nonfinite
    largest_at = max(ranges.largest, key=lambda at: ranges.largest[at])
    largest = ranges.largest[largest_at]
    figures = {
        "first_nonfinite": place,
        "first_nonfinite_float32": wrong,
        "largest_float32": largest,
        "largest_float32_at": largest_at,
    }
    if wrong is not None:
        cause = f"even float32 gives NaN or Inf, first in {wrong}: the weights there are damaged; fetch them again"
        return Check("range", FAIL, f"NaN or Inf in {wrong}, in float32", cause, figures)
    if place is not None:
        detail = f"NaN or Inf, first in {place}; float32 reaches {ranges.largest.get(place, 0.0):.3g} there"
        return Check("range", FAIL, detail, _nonfinite_cause(place, dtype), figures)
    if run.error is not None:
        return Check("range", FAIL, str(run.error), str(run.error), figures)
    detail = f"all finite; max |activation| {largest:.3g}, {largest_at}"
    if dtype == "float16" and largest > _HEADROOM * FLOAT16_MAX:
        return Check("range", WARN, f"{detail}: other pictures may overflow float16", figures=figures)
    return Check("range", OK, detail, figures=figures)


def _nonfinite_cause(place: str, dtype: str) -> str:
    if dtype == "float16":
        return f"float16 overflows in {place}: it ends at {FLOAT16_MAX:.0f}; use --dtype bfloat16"
    return f"NaN or Inf in {place} in {dtype} only: a kernel of this device; try --dtype float32"


def _check_stages(stages: Sequence[Stage], precision: Precision, with_tower: bool) -> Check:
    reached = [stage for stage in stages if stage.reached]
    off = next((stage for stage in stages if not stage.is_ok), None)
    figures = {"stages": [asdict(stage) for stage in stages], "tower_compared": with_tower}
    if off is None:
        rest = "" if with_tower else " (vision tower not compared: --quick)"
        error = stages[-1].relative_error
        detail = f"{len(reached)} within what {precision} explains; logits {error:.2g} off{rest}"
        return Check("stages", OK, detail, figures=figures)
    if not math.isfinite(off.relative_error):
        return Check("stages", SKIPPED, f"not comparable from {off.name} on", figures=figures)
    detail = (
        f"first off at {off.name}: relative error {off.relative_error:.2g} (worst row {off.worst_row:.2g}), "
        f"{off.limit:.2g} is explained by {precision}"
    )
    cause = (
        f"{off.name} is computed wrongly in {precision} on this device, or its memory is faulty: compare with "
        "--device cpu or --dtype float32, and report the kernel"
    )
    return Check("stages", FAIL, detail, cause, figures)


def _check_tokens(
    answer: Sequence[int], logits: torch.Tensor, tokenizer: Tokenizer, precision: Precision, depth: Depth
) -> Check:
    name = "first tokens"
    if not answer:
        return Check(name, SKIPPED, "the engine gave none")
    best = logits.max(dim=1)
    margins = best.values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    allowed = _NEAR_TIE * precision.limit(depth) * logits.square().mean(dim=1).sqrt()
    figures: dict[str, Any] = {
        "text": tokenizer.decode(answer),
        "token_ids": list(answer),
        "first_difference": None,
    }
    differing = margins.nonzero().flatten().tolist()
    if not differing:
        detail = f"{len(answer)} equal to float32: {_shortened(figures['text'])}"
        return Check(name, OK, detail, figures=figures)
    at = next((i for i in differing if margins[i] > allowed[i]), differing[0])
    ours, theirs = answer[at], int(best.indices[at])
    figures["first_difference"] = {
        "position": at,
        "token_id": ours,
        "float32_token_id": theirs,
        "margin": margins[at].item(),
        "allowed": allowed[at].item(),
    }
    words = [repr(tokenizer.token_text(token_id)) for token_id in (ours, theirs)]
    detail = f"token {at} is {words[0]}, float32 wants {words[1]} by {margins[at]:.3g} in logits"
    if margins[at] <= allowed[at]:
        return Check(name, WARN, f"{detail}: a near tie, {allowed[at]:.3g} is explained", figures=figures)
    cause = f"answers differ from float32 at token {at}: see the first stage that is off, or try --dtype float32"
    return Check(name, FAIL, f"{detail}; {allowed[at]:.3g} is explained by {precision}", cause, figures)


def _check_answers(answers: Sequence[str]) -> list[Check]:
    if not answers:
        return []
    given = list(zip(CANARIES, answers, strict=True))
    right = [canary.answer.casefold() in text.casefold() for canary, text in given]
    rows = [{"question": canary.question, "expected": canary.answer, "given": text} for canary, text in given]
    detail = f"{sum(right)} of {len(right)} known answers given"
    if all(right):
        return [Check("answers", OK, detail, figures={"answers": rows})]
    asked, text = given[right.index(False)]
    detail += f"; to {asked.question!r}: {_shortened(text)}, not {asked.answer!r}"
    return [Check("answers", WARN, detail, figures={"answers": rows})]


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
