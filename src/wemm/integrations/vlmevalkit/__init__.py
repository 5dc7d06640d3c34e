"""VLMEvalKit: the engine, or an OpenAI endpoint of it, as one of its models.

`model.py` is loaded when a model is registered; importing this package needs no VLMEvalKit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from wemm.integrations import module_of

INSTALL = (
    "install a checkout of it: git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit"
)


def register(name: str, **options: Any) -> None:
    """Add our model to VLMEvalKit's list under `name`, for `run.py --model NAME`.

    `options` are those of `model.WeMM`. Raises ParameterError where VLMEvalKit is absent.
    """
    config = module_of("VLMEvalKit", "vlmeval.config", INSTALL)
    from wemm.integrations.vlmevalkit.model import WeMM

    config.supported_VLM[name] = partial(WeMM, **options)
