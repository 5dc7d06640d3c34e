"""Are the tensors all there, do they look like weights, and does PLoRA do anything."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wemm.checkpoint.checkpoint import Checkpoint, list_names
from wemm.checkpoint.weight_map import is_plora, part_of, plora_linears
from wemm.cost import count_parameters
from wemm.doctor.check import FAIL, OK, SKIPPED, WARN, Check
from wemm.errors import CheckpointError
from wemm.progress import ProgressBar

FLOAT16_MAX = 65504.0
# A flipped high exponent bit multiplies a weight by 2**8 or more. Trained tensors have outliers too, but
# not one value alone, sixteen times beyond the next and beyond the same tensor of the other layers.
_LONE_OUTLIER = 16.0
# Of a tensor without counterparts in other layers the second comparison is missing.
_LONE_OUTLIER_ALONE = 64.0


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor, in float32."""

    name: str
    num_nonfinite: int
    largest: float
    """max |w|."""
    next_largest: float
    """max |w| of the rows that do not hold the largest."""
    rms: float
    smallest: float
    """min |w|."""

    @property
    def is_zero(self) -> bool:
        """True if every value is 0."""
        return self.largest == 0 and self.num_nonfinite == 0


def check_inventory(checkpoint: Checkpoint) -> Check:
    """What `open_checkpoint` found: it refuses whatever is missing, unexpected or of the wrong shape."""
    parameters = count_parameters(checkpoint.specs.values())
    counts = Counter(part_of(name) for name in checkpoint.tensors)
    quantized = {name for name, spec in checkpoint.specs.items() if spec.scheme is not None}
    dtypes = Counter(tensor.dtype for name, tensor in checkpoint.tensors.items() if name not in quantized)
    mix = " + ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    detail = f"{len(checkpoint.tensors)} tensors, {sum(parameters.values()):,} parameters, {mix}"
    if checkpoint.config.quantization:
        calibration = f" ({checkpoint.calibration})" if checkpoint.calibration else ""
        detail = f"{detail}; quantised: {checkpoint.config.quantization}{calibration}"
    figures: dict[str, Any] = {"tensors": dict(counts), "parameters": parameters, "dtypes": dict(dtypes)}
    if len(dtypes) > 1:
        return Check("tensors", WARN, f"{detail}: stored in several dtypes", figures=figures)
    return Check("tensors", OK, detail, figures=figures)


def measure(checkpoint: Checkpoint, progress: ProgressBar) -> dict[str, TensorStatistics]:
    """Statistics of every tensor, read once, one at a time; of a quantised one as it is multiplied."""
    found = {}
    with progress("reading weights", len(checkpoint.tensors), "tensors") as advance:
        for tensors in checkpoint.tensors_by_file().values():
            for name in (tensor.key for tensor in tensors):
                if not checkpoint.specs[name].is_scale:
                    found[name] = tensor_statistics(name, checkpoint.read(name))
                advance(1)
    return found


def tensor_statistics(name: str, values: torch.Tensor) -> TensorStatistics:
    """Of a tensor, in float32."""
    magnitudes = values.to(torch.float32).abs()
    finite = magnitudes.isfinite()
    num_nonfinite = magnitudes.numel() - int(finite.sum())
    magnitudes = magnitudes.where(finite, torch.zeros(()))
    rows = magnitudes.flatten(1).amax(1) if magnitudes.dim() > 1 else magnitudes
    top = [*rows.topk(min(2, rows.numel())).values.tolist(), 0.0]
    rms = float(magnitudes.square().mean().sqrt())
    return TensorStatistics(name, num_nonfinite, top[0], top[1], rms, float(magnitudes.min()))


def check_weights(found: Mapping[str, TensorStatistics], dtype: str) -> Check:
    """Finite, of a sane size, and not copies of each other."""
    nonfinite = [s.name for s in found.values() if s.num_nonfinite]
    outliers = _lone_outliers(found)
    zeros = [s.name for s in found.values() if s.is_zero and not is_plora(s.name)]
    too_large = [s.name for s in found.values() if s.largest > FLOAT16_MAX and dtype == "float16"]
    copies = _copies(found.values())
    figures = {
        "nonfinite": nonfinite, "zero": zeros, "beyond_float16": too_large, "copies": copies,
        "outliers": {s.name: {"largest": s.largest, "next": s.next_largest, "rms": s.rms} for s in outliers},
    }  # fmt: skip
    problems = []
    if nonfinite:
        problems.append((f"NaN or Inf in {list_names(nonfinite)}", "the file is damaged: fetch it again"))
    if outliers:
        s = outliers[0]
        problems.append((
            f"{s.name} holds one value of {s.largest:.3g}, where the next is {s.next_largest:.3g}",
            "looks like a flipped bit: fetch the file again",
        ))  # fmt: skip
    if zeros:
        problems.append((f"{list_names(zeros)} is all zero", "never written: convert or fetch the file again"))
    if too_large:
        problems.append((f"{list_names(too_large)} does not fit into float16", "use --dtype bfloat16"))
    if problems:
        detail, remedy = problems[0]
        return Check("weights", FAIL, "; ".join(text for text, _ in problems), f"{detail}; {remedy}", figures)
    if copies:
        return Check("weights", WARN, f"{copies[0][0]} and {copies[0][1]} are equal", figures=figures)
    largest = max(found.values(), key=lambda s: s.largest)
    return Check("weights", OK, f"all finite, max |w| {largest.largest:.3g} in {largest.name}", figures=figures)


def _lone_outliers(found: Mapping[str, TensorStatistics]) -> list[TensorStatistics]:
    kinds: dict[str, list[float]] = defaultdict(list)
    for s in found.values():
        kinds[_kind(s.name)].append(s.largest)
    outliers = []
    for s in found.values():
        siblings = kinds[_kind(s.name)]
        usual = statistics.median_low(siblings)
        beyond_next = s.largest / max(s.next_largest, 1e-30)
        beyond_usual = s.largest / max(usual, 1e-30)
        alone = len(siblings) == 1 and beyond_next > _LONE_OUTLIER_ALONE
        if alone or (len(siblings) > 1 and min(beyond_next, beyond_usual) > _LONE_OUTLIER):
            outliers.append(s)
    return sorted(outliers, key=lambda s: -s.largest / max(s.rms, 1e-30))


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _copies(found: Iterable[TensorStatistics]) -> list[tuple[str, str]]:
    # Equal extremes and rms: no two trained tensors have them. Constant ones (fresh norms) do.
    seen: dict[tuple[float, ...], str] = {}
    copies = []
    for s in found:
        if s.largest == s.smallest:
            continue
        key = (s.largest, s.next_largest, s.rms, s.smallest)
        if key in seen:
            copies.append((seen[key], s.name))
        seen.setdefault(key, s.name)
    return copies


def check_plora(checkpoint: Checkpoint, found: Mapping[str, TensorStatistics]) -> Check:
    """Present, not zero, and of one mind about its scaling."""
    plora = checkpoint.plora
    if plora is None:
        return Check("PLoRA", SKIPPED, "turned off: answers about images are not the model's own")
    linears = plora_linears(checkpoint.config)
    dead = [
        linear for linear in linears
        if any(found[f"{linear}.{factor}.weight"].is_zero for factor in ("Plora_A", "Plora_B"))
    ]  # fmt: skip
    scalings = sorted({plora.scaling(linear) for linear in linears})
    other = stated_elsewhere(checkpoint)
    figures = {
        "source": plora.source, "linears": len(linears), "without_effect": dead, "rank": plora.r,
        "scaling": scalings, "stated_elsewhere": other,
    }  # fmt: skip
    shown = ", ".join(f"{scaling:g}" for scaling in scalings)
    if dead:
        which = "all" if len(dead) == len(linears) else f"{len(dead)} of"
        return Check(
            "PLoRA", FAIL, f"{which} {len(linears)} linears have a factor of zeros: {list_names(dead)}",
            "PLoRA is present but has no effect, its factors are zero: the files were written without it; "
            "fetch or convert the checkpoint again", figures,
        )  # fmt: skip
    if other is not None:
        return Check(
            "PLoRA", FAIL, f"scaling {plora.scaling(linears[0]):g} by {Path(plora.source).name}, {other:g} by "
            "lora_cfg of config.json",
            "the PLoRA scaling is wrong in one of two files: correct lora_alpha of "
            f"{Path(plora.source).name} or lora_cfg of config.json", figures,
        )  # fmt: skip
    return Check("PLoRA", OK, f"{len(linears)} linears, rank {plora.r}, scaling {shown}", figures=figures)


def stated_elsewhere(checkpoint: Checkpoint) -> float | None:
    """The scaling of config.json's lora_cfg where adapter_config.json says something else."""
    plora, stated = checkpoint.plora, checkpoint.config.lora_cfg
    linear = plora_linears(checkpoint.config)[0]
    if plora is None or stated is None or stated.scaling(linear) == plora.scaling(linear):
        return None
    return stated.scaling(linear)


def refused(error: CheckpointError) -> Check:
    """A directory that does not open."""
    return Check("tensors", FAIL, str(error), str(error))
