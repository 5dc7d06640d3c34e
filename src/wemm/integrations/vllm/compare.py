"""`python -m wemm.integrations.vllm.compare MODEL`: the same questions to our engine and to vLLM, in turn.

Each in a process of its own, so that neither's threads and memory are in the other's way.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from typing import Annotated, Any

import typer

from wemm import LLM, SamplingParams
from wemm.benchmark.workload import Workload, parse_size
from wemm.integrations import module_of
from wemm.integrations.vllm import INSTALL


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint directory.")],
    requests: Annotated[int, typer.Option(help="Questions, all asked at once.")] = 16,
    images: Annotated[int, typer.Option(help="Different images they are about, in turn.")] = 16,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT, or none.")] = "640x480",
    output_len: Annotated[int, typer.Option(help="Tokens of every answer.")] = 64,
    max_model_len: Annotated[int, typer.Option(help="Of both engines.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Of both engines.")] = "bfloat16",
    load_format: Annotated[str, typer.Option(help="auto or dummy, of both engines.")] = "auto",
    vllm_options: Annotated[str, typer.Option(help="Further options of vLLM's, as a JSON object.")] = "{}",
) -> None:
    """Seconds and requests per second of both; a first, smaller batch warms them up."""
    workload = Workload(requests, parse_size(image_size), images, prompt_words=8, seed=0)
    shared = {"dtype": dtype, "max_model_len": max_model_len, "load_format": load_format}
    spawn = multiprocessing.get_context("spawn")
    for name, measure, options in (
        ("wemm", _wemm, shared),
        ("vllm", _vllm, {**shared, **json.loads(vllm_options)}),
    ):
        results: Any = spawn.SimpleQueue()
        process = spawn.Process(target=measure, args=(model, workload, output_len, options, results))
        process.start()
        while results.empty():
            process.join(0.1)
            if process.exitcode is not None:
                raise SystemExit(process.exitcode or 1)
        start, seconds = results.get()
        print(
            f"{name}: {seconds:.2f} s, {requests / seconds:.1f} requests/s, "
            f"{requests * output_len / seconds:.0f} output tokens/s; ready after {start:.0f} s",
            flush=True,
        )
        process.join()


def _wemm(model: str, workload: Workload, output_len: int, options: Any, results: Any) -> None:
    began = time.perf_counter()
    with LLM(model, **options) as llm:
        params = SamplingParams(max_tokens=output_len, ignore_eos=True, repetition_guard=False)
        llm.chat(_warm_up(workload).conversations(), SamplingParams(max_tokens=4, ignore_eos=True))
        started = time.perf_counter()
        llm.chat(workload.conversations(), params)
        results.put((started - began, time.perf_counter() - started))


def _vllm(model: str, workload: Workload, output_len: int, options: Any, results: Any) -> None:
    vllm = module_of("vLLM", "vllm", INSTALL)
    began = time.perf_counter()
    llm = vllm.LLM(model, disable_log_stats=True, **options)
    params = vllm.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    llm.chat([_for_vllm(c) for c in _warm_up(workload).conversations()], params, use_tqdm=False)
    conversations = [_for_vllm(c) for c in workload.conversations()]
    started = time.perf_counter()
    llm.chat(conversations, params, use_tqdm=False)
    results.put((started - began, time.perf_counter() - started))
    llm.llm_engine.engine_core.shutdown()


def _warm_up(workload: Workload) -> Workload:
    return Workload(2, workload.image_size, 2, workload.prompt_words, workload.seed + 1)


def _for_vllm(conversation: Any) -> list[Any]:
    def part(part: Any) -> Any:
        return {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part

    return [{**message, "content": [part(p) for p in message["content"]]} for message in conversation]


if __name__ == "__main__":
    typer.run(main)
