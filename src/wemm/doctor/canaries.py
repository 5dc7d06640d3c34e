"""Pictures with known answers: how probable a checkpoint finds the right words, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from wemm.config import ModelConfig
from wemm.doctor.reference import Reference, Sample
from wemm.processing.chat_template import Message
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.processor import Processor, image_reader
from wemm.processing.tokenizer import Tokenizer

PICTURES = Path(__file__).parent / "pictures"
# Of a picture that makes more patches than this, half the edges are enough to read it.
_MANY_PATCHES = 1024
_HEADER = "assistant\n"


@dataclass(frozen=True)
class Canary:
    """A question about a bundled picture, and the answer."""

    picture: str
    question: str
    answer: str


CANARIES = (
    Canary("word.png", "What word is written here?", "WEMM"),
    Canary("word.png", "图中的单词是什么？", "WEMM"),
    Canary("number.png", "图中的数字是多少？", "2048"),
    Canary("number.png", "What number is written here?", "2048"),
    Canary("shapes.png", "How many circles are there?", "3"),
    Canary("shapes.png", "What colour is the star?", "blue"),
    Canary("shapes.png", "心形是什么颜色的？", "绿色"),
    Canary("letters.png", "Which letters does the image show?", "AKKVPJ"),
    Canary("digits.png", "图中的数字是多少？", "59945"),
)


@dataclass(frozen=True)
class Score:
    """How surprised a model is by the right answers."""

    losses: tuple[float, ...]
    """Negative log-likelihood of each answer and the stop token behind it, in nats."""
    num_tokens: int

    @property
    def total(self) -> float:
        """Nats over all answers."""
        return sum(self.losses)

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.total / self.num_tokens


@dataclass(frozen=True)
class Gate:
    """Mean of the outputs of w1 and of w3 in one layer, in standard deviations."""

    w1: float
    w3: float


def detail_of(config: ModelConfig, picture: Path, quick: bool = False) -> str:
    """`low` where the whole picture would be thousands of patches."""
    from PIL import Image

    with Image.open(picture) as image:
        plan = ImageProcessor(config).plan(*image.size)
    return "low" if quick or plan.num_patches > _MANY_PATCHES else "auto"


def conversation(canary: Canary, config: ModelConfig) -> list[Message]:
    """As any door takes it."""
    picture = PICTURES / canary.picture
    image = {"type": "image", "image": picture, "detail": detail_of(config, picture)}
    return [{"role": "user", "content": [image, {"type": "text", "text": canary.question}]}]


class Scorer:
    """Scores the canaries under one checkpoint, changed or not; pictures are encoded once."""

    def __init__(self, reference: Reference, config: ModelConfig, tokenizer: Tokenizer) -> None:
        self._reference = reference
        self._config = config
        self._tokenizer = tokenizer
        self._embeds: dict[str, torch.Tensor] = {}
        self._samples: dict[Tokenizer, list[tuple[Sample, list[int]]]] = {}

    def score(self, tokenizer: Tokenizer | None = None) -> Score:
        """Of the checkpoint as the reference now is, with its own tokenizer or another."""
        tokenizer = tokenizer or self._tokenizer
        if tokenizer not in self._samples:
            self._samples[tokenizer] = [self._sample(canary, tokenizer) for canary in CANARIES]
        samples, answers = zip(*self._samples[tokenizer], strict=True)
        embeds = [self._encoded(sample) for sample in samples]
        logits = self._reference.logits(samples, embeds)
        losses = [
            F.cross_entropy(rows, torch.tensor(answer, device=rows.device), reduction="sum").item()
            for rows, answer in zip(logits, answers, strict=True)
        ]
        # What is not a number is no worse than certainly wrong.
        worst = 100.0 * len(answers)
        return Score(tuple(x if math.isfinite(x) else worst for x in losses), sum(map(len, answers)))

    def _sample(self, canary: Canary, tokenizer: Tokenizer) -> tuple[Sample, list[int]]:
        read = image_reader(ImageProcessor(self._config))
        text = self._config.text
        processor = Processor(tokenizer, read, text.max_position_embeddings, text.vocab_size)
        prompt = processor.chat(conversation(canary, self._config))
        header = tokenizer.encode(_HEADER)
        answer = [*tokenizer.encode(_HEADER + canary.answer)[len(header) :], tokenizer.im_end_id]
        return Sample((*prompt.token_ids, *answer[:-1]), prompt.image_spans, len(answer)), answer

    def _encoded(self, sample: Sample) -> torch.Tensor:
        [span] = sample.image_spans
        if span.image.sha256 not in self._embeds:
            self._embeds[span.image.sha256] = self._reference.visual_embeds(span)
        return self._embeds[span.image.sha256]


@contextmanager
def watching_gates(reference: Reference) -> Iterator[list[Gate]]:
    """Inside, every pass appends one `Gate` per layer."""
    gates: list[Gate] = []
    shifts: list[float] = []

    def watch(module: Any, arguments: Any, output: torch.Tensor) -> None:
        shifts.append((output.mean() / output.std().clamp(min=1e-30)).item())
        if len(shifts) == 2:
            gates.append(Gate(*shifts))
            shifts.clear()

    layers: Sequence[Any] = list(reference.model.language_model.layers)
    handles = [
        linear.register_forward_hook(watch)
        for layer in layers
        for linear in (layer.feed_forward.w1, layer.feed_forward.w3)  # in the order they run
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
