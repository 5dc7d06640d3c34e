"""`wemm chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from wemm.cli.options import SamplingOverrides, engine_options, sampling_options
from wemm.config import EngineConfig
from wemm.errors import WemmError
from wemm.processing.media import open_image
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

if TYPE_CHECKING:
    from wemm.engine.llm import LLM

_HELP = """\
/image PATH   add an image to the next message (repeat for several)
/clear        start over
/help         this text
/exit         leave (or Ctrl-D); Ctrl-C stops an answer"""


@engine_options
@sampling_options
def chat(*, engine: EngineConfig, sampling: SamplingOverrides) -> None:
    """Talk with the model, turn by turn, with images by path. Type /help inside."""
    from wemm.engine.llm import LLM

    sampling.apply(SamplingParams())
    with LLM(progress=terminal_bar, **vars(engine)) as llm:
        _Conversation(llm, sampling.apply(llm.default_sampling_params)).run()


class _Conversation:
    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params
        self._messages: list[dict[str, Any]] = []
        self._images: list[str] = []
        self._interactive = sys.stdin.isatty()

    def run(self) -> None:
        if self._interactive:
            import readline  # noqa: F401 - gives input() history and editing

            print("Type a question, /image PATH to show a picture, /help for more.")
        while (line := self._read()) is not None:
            command, _, argument = line.partition(" ")
            if command == "/exit":
                return
            if command == "/help":
                print(_HELP)
            elif command == "/clear":
                self._messages, self._images = [], []
            elif command == "/image":
                self._add_image(argument.strip().strip("'\""))
            elif line.startswith("/") and " " not in line and "/" not in line[1:]:
                _complain(f"no command {command}; /help lists them")
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        try:
            marker = f"[{len(self._images)} image(s)] > " if self._images else "> "
            return input(marker if self._interactive else "").strip()
        except EOFError:
            return None

    def _add_image(self, path: str) -> None:
        try:
            open_image(path)
        except WemmError as error:
            _complain(str(error))
            return
        self._images.append(path)

    def _answer(self, text: str) -> None:
        parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in self._images]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        answer = ""
        try:
            for output in self._llm.stream_chat([*self._messages, question], self._params):
                print(output.outputs[0].text[len(answer) :], end="", flush=True)
                answer = output.outputs[0].text
            print()
        except KeyboardInterrupt:
            print(" (stopped)")
        except WemmError as error:
            _complain(f"{error} (/clear starts over)")
            return
        self._messages += [question, {"role": "assistant", "content": answer}]
        self._images = []


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
