"""`wemm generate`: one answer on stdout."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from wemm.cli.options import SamplingOverrides, engine_options, sampling_options
from wemm.config import EngineConfig
from wemm.progress import terminal_bar
from wemm.request import RequestOutput, SamplingParams


@engine_options
@sampling_options
def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="The question.")],
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", metavar="FILE", help="An image file; repeat for several, in order."),
    ] = None,
    json_output: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object: text, token ids, finish reason, counts, timings."),
    ] = False,
    *,
    engine: EngineConfig,
    sampling: SamplingOverrides,
) -> None:
    """Answer one question about any number of images.

    Example: wemm generate --model nano --image cat.jpg --prompt "What is in the picture?"
    """
    from wemm.engine.llm import LLM

    parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in image or ()]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
    sampling.apply(SamplingParams())  # a typo must not cost the loading of 19 GB
    with LLM(progress=terminal_bar, **vars(engine)) as llm:
        params = sampling.apply(llm.default_sampling_params)
        shown = 0
        for output in llm.stream_chat(messages, params):
            if not json_output:
                text = output.outputs[0].text
                print(text[shown:], end="", flush=True)
                shown = len(text)
    if json_output:
        print(json.dumps(_as_json(output), ensure_ascii=False))
    else:
        print()
        if output.outputs[0].finish_reason == "length" and sys.stderr.isatty():
            print(
                f"(stopped after {len(output.outputs[0].token_ids)} tokens; see --max-tokens)",
                file=sys.stderr,
            )


def _as_json(output: RequestOutput) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "image_tokens": output.num_image_tokens,
        "completion_tokens": len(answer.token_ids),
        "timings": {name: round(seconds, 6) for name, seconds in asdict(output.metrics).items()},
    }
