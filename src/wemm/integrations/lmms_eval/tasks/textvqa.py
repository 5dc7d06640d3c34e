"""What wemm_textvqa.yaml calls: documents, prompts, scores. lmms-eval runs this file by its path."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wemm.errors import ParameterError
from wemm.evaluation.metrics.vqa_accuracy import vqa_accuracy
from wemm.evaluation.textvqa import Sample, load_samples

QUESTIONS = "WEMM_TEXTVQA"
"""The environment variable that names the file of questions, as `wemm.evaluation.textvqa` describes it."""
Document = Mapping[str, Any]


def __getattr__(name: str) -> Any:
    # The YAML takes an attribute, not a call: so the files are looked for when the task is loaded, before the
    # harness starts to try a download again and again.
    if name == "DATA_FILES":
        return data_files()
    raise AttributeError(name)


def data_files() -> dict[str, str]:
    """What the harness loads: split → file of questions. Raises ParameterError if one is missing or wrong."""
    questions = _questions_file()
    if not questions.is_file():
        raise ParameterError(f"no file {questions}; {QUESTIONS}=…/textvqa_val.jsonl says where the questions are")
    missing = [
        path for path in (sample.image_path for sample in load_samples(questions)) if not Path(path).is_file()
    ]
    if missing:
        raise ParameterError(f"{questions}: {len(missing)} of its images are missing, such as {missing[0]}")
    return {"validation": str(questions)}


def process_docs(dataset: Any) -> Any:
    """A data set of the harness's kind, with absolute image paths and the answers of people."""
    return dataset.from_list([_document(sample) for sample in load_samples(_questions_file())])


def _questions_file() -> Path:
    return Path(os.environ.get(QUESTIONS) or "textvqa_val.jsonl").resolve()


def _document(sample: Sample) -> dict[str, Any]:
    references = sample.references
    return {
        "question_id": sample.question_id,
        "question": sample.question,
        "image": sample.image_path,
        "answer": Counter(references).most_common(1)[0][0],
        "answers": references,
    }


def doc_to_visual(doc: Document) -> list[Any]:
    """The question's image as any model of the harness takes it: upright, RGB."""
    from wemm.processing.media import open_image

    return [open_image(Path(doc["image"]))]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The question as it is written, between the prompts of the YAML."""
    prompts = lmms_eval_specific_kwargs or {}
    return f"{prompts.get('pre_prompt', '')}{doc['question']}{prompts.get('post_prompt', '')}"


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """The score of one answer, 0..1; the harness takes their mean."""
    return {"vqa_accuracy": vqa_accuracy(results[0], doc["answers"])}
