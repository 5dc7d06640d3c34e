"""Every exception that leaves the package, and whose fault it is.

WemmError
├── ClientError                     the caller can mend it; the message names value and remedy
│   ├── ModelNotFoundError          no checkpoint under that name
│   ├── CheckpointError             files that are missing, damaged or do not fit together
│   │   └── ConfigError             a JSON file says something impossible or unsupported
│   ├── MediaError                  bytes that are not an acceptable image
│   ├── PromptError                 messages that do not make a prompt
│   │   └── PromptTooLongError      more tokens than max_model_len
│   ├── RequestTimeoutError         the request's own time limit passed
│   ├── ParameterError              an option or sampling parameter out of range
│   ├── DeviceError                 unknown or absent device
│   ├── InsufficientMemoryError     the plan does not fit; the message is the plan
│   ├── StorageError                the disk refused: full, not writable, already there
│   └── EndpointError               a service that is asked over HTTP is gone, or refuses
└── EngineError                     ours, or the weights'
    ├── StepError                   a step raised; its requests failed, the engine goes on
    ├── StructuredOutputError       a grammar failed in the middle of an answer
    ├── RankError                   a tensor-parallel rank is gone; the engine is at its end
    ├── EngineDeadError             the engine's process is gone
    ├── NumericalError              NaN or Inf left a stage; the message names the stage
    └── IntegrityError              an invariant of the engine is broken
"""

from __future__ import annotations


class WemmError(Exception):
    """Root of everything this package raises on purpose."""


class ClientError(WemmError):
    """The caller can mend it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        """`param` is what is wrong, where it has a name: `top_p`, `messages[0].content[1].image_url`."""
        super().__init__(message)
        self.param = param


class ModelNotFoundError(ClientError):
    """No checkpoint under the given name."""


class CheckpointError(ClientError):
    """Checkpoint files that are missing, damaged or do not fit together."""


class ConfigError(CheckpointError):
    """A JSON file of the checkpoint says something impossible or unsupported."""


class MediaError(ClientError):
    """Bytes that are not an acceptable image."""


class PromptError(ClientError):
    """Messages that do not make a prompt."""


class PromptTooLongError(PromptError):
    """The prompt has more tokens than `max_model_len` leaves room for."""


class RequestTimeoutError(ClientError):
    """The time limit that came with the request passed before it was answered."""


class ParameterError(ClientError):
    """An option or sampling parameter is out of range."""


class DeviceError(ClientError):
    """The device is unknown or absent."""


class InsufficientMemoryError(ClientError):
    """The memory plan does not fit; the message is the plan."""


class StorageError(ClientError):
    """The disk refused: full, not writable, or the target exists."""


class EndpointError(ClientError):
    """A service that is asked over HTTP cannot be reached, or refuses."""


class EngineError(WemmError):
    """Not the caller's fault."""


class StepError(EngineError):
    """A step of the engine raised: the requests in it failed, the engine goes on."""


class StructuredOutputError(EngineError):
    """The grammar of a structured answer failed, by its own limits or ours."""


class RankError(EngineError):
    """A tensor-parallel rank failed or died: the engine is at its end, load the model again."""


class EngineDeadError(EngineError):
    """The process of the engine failed or was killed: what it had under way is lost."""


class NumericalError(EngineError):
    """NaN or Inf left a stage of the computation."""

    def __init__(self, stage: str, dtype: str) -> None:
        remedy = "float32" if dtype == "bfloat16" else "bfloat16 or float32"
        super().__init__(f"NaN or Inf in stage {stage!r} computed in {dtype}; try --dtype {remedy}")
        self.stage = stage
        self.dtype = dtype

    def __reduce__(self) -> tuple[type[NumericalError], tuple[str, str]]:
        return NumericalError, (self.stage, self.dtype)


class IntegrityError(EngineError):
    """An invariant of the engine is broken."""
