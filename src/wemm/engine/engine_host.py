"""`python -m wemm.engine.engine_host FD`: the process in which an engine runs. Orders in, reports out.

One thread receives orders, the main thread steps. Grammars are compiled where orders are received, so that a
large one holds up only what was ordered after it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from wemm.config import EngineConfig
from wemm.engine.build import BuiltEngine, build_engine
from wemm.engine.engine import Engine
from wemm.engine.engine_process import Advanced, Began, Checked, Ended, Logged, Pipe, Started, Stepped
from wemm.engine.sequence import Request
from wemm.engine.structured import GrammarCompiler
from wemm.errors import EngineError, WemmError
from wemm.progress import Advance, Description
from wemm.request import RequestOutput

logger = logging.getLogger("wemm.engine.engine_host")  # not __main__

_Order = tuple[str, tuple[Any, ...]]


class _Host:
    def __init__(self, pipe: Pipe, built: BuiltEngine) -> None:
        self._pipe = pipe
        self._engine: Engine = built.engine
        self._grammars = GrammarCompiler(built.tokenizer, built.source.config.text.vocab_size)
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._seen: dict[str, RequestOutput] = {}

    def run(self) -> None:
        """Take orders, step while there is work, sleep while there is none."""
        threading.Thread(target=self._receive, daemon=True).start()
        while self._take_orders():
            outputs = self._engine.step()
            self._report(outputs)
        self._engine.close()

    def _receive(self) -> None:
        try:
            while True:
                order = self._pipe.receive()
                if order is not None and order[0] == "add_request":
                    order = self._with_grammar(*order[1])
                self._orders.put(order)
                if order is None:
                    return
        except (EOFError, OSError):
            os._exit(1)  # the door is gone, and nobody waits for the step under way
        except Exception:  # without this thread the engine would hear of nothing any more
            logger.exception("an order could not be received")
            os._exit(1)

    def _with_grammar(self, request: Request) -> _Order:
        wanted = request.sampling_params.structured_outputs
        if wanted is None:
            return "add_request", (request,)
        try:
            return "add_request", (replace(request, grammar=self._grammars.compile(wanted)),)
        except WemmError as error:
            return "refuse", (request, error)

    def _take_orders(self) -> bool:
        """Everything that was ordered; waits for an order if there is nothing to do. False: the end."""
        while not self._orders.empty() or not self._engine.num_unfinished:
            order = self._orders.get()
            if order is None:
                return False
            self._obey(*order)
            if self._orders.empty() and not self._engine.num_unfinished:
                self._report([])  # what was freed
        return True

    def _obey(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "check_integrity":
            self._pipe.send(Checked(_integrity(self._engine)))
        elif name == "refuse":
            request, error = arguments
            self._report([RequestOutput(request.request_id, request.prompt.token_ids, (), True, error=error)])
        else:
            if name == "abort":
                self._seen.pop(arguments[0], None)
            getattr(self._engine, name)(*arguments)

    def _report(self, outputs: list[RequestOutput]) -> None:
        deltas = tuple(self._delta(output) for output in outputs)
        self._pipe.send(Stepped(deltas, self._engine.stats))

    def _delta(self, output: RequestOutput) -> RequestOutput:
        before = self._seen.pop(output.request_id, None)
        if not output.finished:
            self._seen[output.request_id] = output
        if before is None:
            return output
        answers = []
        for now, then in zip(output.outputs, before.outputs, strict=True):
            count = len(then.token_ids)
            logprobs = None if now.logprobs is None else now.logprobs[count:]
            text, token_ids = now.text[len(then.text) :], now.token_ids[count:]
            answers.append(replace(now, text=text, token_ids=token_ids, logprobs=logprobs))
        return replace(output, prompt_token_ids=(), outputs=tuple(answers))


class _ToTheDoor(logging.Handler):
    """Log records as reports."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())  # the message alone
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Send one, with its traceback if it has one."""
        with contextlib.suppress(OSError):  # the door is gone
            self._pipe.send(Logged(record.name, record.levelno, self.format(record)))


def _integrity(engine: Engine) -> WemmError | None:
    try:
        engine.check_integrity()
    except WemmError as error:
        return error
    return None


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and a service manager's end are the door's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe = Pipe(int(sys.argv[1]))
    logging.basicConfig(level=logging.INFO, handlers=[_ToTheDoor(pipe)])

    @contextlib.contextmanager
    def reported(description: Description, total: int | None, unit: str) -> Iterator[Advance]:
        said = description if isinstance(description, str) else description()
        pipe.send(Began((said, total, unit)))
        yield lambda amount: pipe.send(Advanced(amount))

    try:
        config = EngineConfig(**pipe.receive())
        built = build_engine(config, reported)
        plan = built.memory_plan
        pipe.send(Started(plan.max_model_len, plan.dtype, built.engine.stats))
        _Host(pipe, built).run()
    except WemmError as error:
        pipe.send(Ended(error))
    except Exception as error:  # whatever ends the engine, the door must hear of it
        logger.exception("the engine has come to its end")
        pipe.send(Ended(EngineError(f"the engine failed: {error!r}")))


if __name__ == "__main__":
    _main()
