"""`wemm info`: what a checkpoint is and what it will cost."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wemm.config import PLORA_LINEARS, QUANTIZATIONS, EngineConfig, QuantizationConfig
from wemm.errors import ParameterError

if TYPE_CHECKING:
    from rich.table import Table

    from wemm.engine.build import Source


def info(
    model: Annotated[str, typer.Argument(metavar="M", help=EngineConfig.help()["model"])],
    image_size: Annotated[
        str, typer.Option(metavar="WxH", help="What one image of this size costs.")
    ] = "1960x1470",
    plora: Annotated[bool, typer.Option("--plora/--no-plora", help=EngineConfig.help()["plora"])] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Architecture, parameters, PLoRA, files, the cost of an image and the memory per dtype.

    Reads file headers only. A preset needs no files.

    Example: wemm info wemm-chat-2k-cn --image-size 640x480
    """
    from wemm.checkpoint.checkpoint import is_preset
    from wemm.engine.build import find_source

    width, height = parse_image_size(image_size)
    load_format = "dummy" if is_preset(model) else "auto"
    source = find_source(EngineConfig(model, load_format=load_format, plora=plora))
    report = build_report(model, source, width, height)
    if json_output:
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print(report)


def parse_image_size(text: str) -> tuple[int, int]:
    """ "640x480" → (640, 480). Raises ParameterError."""
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text)
    if not match or 0 in (int(match[1]), int(match[2])):
        raise ParameterError(f"--image-size is WIDTHxHEIGHT in pixels, such as 640x480. Given: {text!r}")
    return int(match[1]), int(match[2])


def build_report(model: str, source: Source, width: int, height: int) -> dict[str, Any]:
    """Everything `info` prints, as JSON-ready data."""
    from wemm.checkpoint.weight_map import expected_tensors, plora_linears
    from wemm.cost import count_parameters, image_cost

    parameters = count_parameters(expected_tensors(source.config, source.plora).values())
    total = sum(parameters.values())
    cost = image_cost(source.config, source.plora, width, height, "bfloat16")
    checkpoint = source.checkpoint
    report: dict[str, Any] = {
        "model": model,
        "directory": str(checkpoint.directory) if checkpoint else None,
        "dtype": source.dtype,
        "quantization": asdict(source.config.quantization),
        "calibration": checkpoint.calibration if checkpoint else None,
        "architecture": {
            "vision": asdict(source.config.vision),
            "downsampler": asdict(source.config.downsampler),
            "text": asdict(source.config.text),
            "image": asdict(source.config.image),
        },
        "parameters": {**parameters, "total": total},
        "plora": None,
        "files": {},
        "image": {
            "size": [width, height],
            "resized": list(cost.plan.resized),
            "patch_grid": list(cost.plan.patch_grid),
            "num_tokens": cost.plan.num_tokens,
            "kv_bytes_16_bit": cost.kv_bytes,
            "tower_flops": cost.tower_flops,
            "tower_attention_flops": cost.tower_attention_flops,
            "downsampler_flops": cost.downsampler_flops,
            "prefill_flops": cost.prefill_flops,
        },
        "memory": _memory(source),
    }
    if source.plora is not None:
        report["plora"] = {
            "source": source.plora.source,
            "linears": {
                name: {"rank": source.plora.rank(name), "scaling": source.plora.scaling(name)}
                for name in plora_linears(source.config)
            },
        }
    if checkpoint is not None:
        files = {tensor.file for tensor in checkpoint.tensors.values()}
        report["files"] = {str(file): file.stat().st_size for file in sorted(files)}
    return report


def _memory(source: Source) -> dict[str, dict[str, int]]:
    """By dtype, and by scheme with everything else in bfloat16."""
    from wemm.checkpoint.weight_map import expected_tensors
    from wemm.cost import DTYPE_BYTES, kv_bytes_per_token, stored_bytes

    stored = source.config.quantization
    forms = {dtype: (dtype, stored) for dtype in DTYPE_BYTES}
    if not stored:
        forms |= {scheme: ("bfloat16", QuantizationConfig(scheme)) for scheme in QUANTIZATIONS}
    return {
        name: {
            "weights": stored_bytes(expected_tensors(source.config, source.plora, quantization).values(), dtype),
            "kv_per_token": kv_bytes_per_token(source.config, dtype),
        }
        for name, (dtype, quantization) in forms.items()
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    text, vision = report["architecture"]["text"], report["architecture"]["vision"]
    stored = QuantizationConfig(**report["quantization"])
    kept = ", ".join(filter(None, (report["dtype"], str(stored) if stored else None, report["calibration"])))
    console.print(f"[bold]{report['model']}[/bold]  {kept}  {report['directory'] or '(no files)'}")
    console.print(
        f"vision tower  {vision['num_hidden_layers']} layers, {vision['hidden_size']} wide, "
        f"{vision['num_attention_heads']} heads, patch {vision['patch_size']}, image_size {vision['image_size']}"
    )
    console.print(
        f"InternLM2     {text['num_hidden_layers']} layers, {text['hidden_size']} wide, "
        f"{text['num_attention_heads']} heads ({text['num_key_value_heads']} KV), "
        f"vocabulary {text['vocab_size']}, {text['max_position_embeddings']} positions"
    )
    for table in (
        _parameter_table(report),
        _plora_table(report),
        _image_table(report),
        _memory_table(report),
    ):
        console.print(table)
    for file, size in report["files"].items():
        console.print(f"{size / 1e9:9.3f} GB  {file}")


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _parameter_table(report: dict[str, Any]) -> Table:
    table = _table("Parameters", "part", "parameters", "share")
    total = report["parameters"]["total"]
    for part, count in report["parameters"].items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    return table


def _plora_table(report: dict[str, Any]) -> Table:
    if report["plora"] is None:
        table = _table("PLoRA: off (--no-plora); answers differ from the reference", "")
        table.show_header = False
        return table
    table = _table(
        f"PLoRA on image tokens, from {report['plora']['source']}", "linear", "layers", "rank", "scaling"
    )
    groups: dict[tuple[str, int, float], list[int]] = defaultdict(list)
    for name, applied in report["plora"]["linears"].items():
        kind = next(linear for linear in PLORA_LINEARS if name.endswith(linear))
        groups[kind, applied["rank"], applied["scaling"]].append(int(name.split(".")[3]))
    for (kind, rank, scaling), layers in groups.items():
        table.add_row(kind, _ranges(layers), str(rank), f"{scaling:g}")
    return table


def _ranges(numbers: list[int]) -> str:
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def _image_table(report: dict[str, Any]) -> Table:
    image = report["image"]
    width, height = image["size"]
    table = _table(f"One image of {width}x{height}", "", "")
    table.show_header = False
    rows, columns = image["patch_grid"]
    table.add_row("resized to", "x".join(map(str, image["resized"])))
    table.add_row("patches", f"{rows} x {columns} = {rows * columns:,}")
    table.add_row("prompt tokens", f"{image['num_tokens']:,}")
    table.add_row("KV cache (16 bit)", f"{image['kv_bytes_16_bit'] / 2**20:.1f} MiB")
    tower, attention = image["tower_flops"], image["tower_attention_flops"]
    table.add_row("vision tower", f"{tower / 1e12:.3g} TFLOP ({attention / tower:.0%} attention)")
    table.add_row("downsampler", f"{image['downsampler_flops'] / 1e12:.3g} TFLOP")
    table.add_row("language model prefill", f"{image['prefill_flops'] / 1e12:.3g} TFLOP")
    return table


def _memory_table(report: dict[str, Any]) -> Table:
    table = _table("Memory", "stored as", "weights", "KV per 1000 tokens")
    for dtype, memory in report["memory"].items():
        kv = memory["kv_per_token"] * 1000 / 2**20
        table.add_row(dtype, f"{memory['weights'] / 2**30:,.2f} GiB", f"{kv:,.1f} MiB")
    return table
