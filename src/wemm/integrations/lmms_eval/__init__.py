"""lmms-eval: the engine as its model `wemm`, TextVQA from local files as its task `wemm_textvqa`.

`model.py` and `tasks/` are read by the harness itself; importing this package needs no lmms-eval.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wemm.integrations import module_of

TASKS = Path(__file__).parent / "tasks"
"""For `--include_path`."""
MODEL = "wemm"
INSTALL = "install it: pip install git+https://github.com/EvolvingLMMs-Lab/lmms-eval"


def manifest() -> Any:
    """The ModelManifest that names our class; lmms-eval finds this function in entry points `lmms_eval.models`."""
    registry = module_of("lmms-eval", "lmms_eval.models.registry_v2", INSTALL)
    return registry.ModelManifest(model_id=MODEL, chat_class_path=f"{__name__}.model.WeMM")
