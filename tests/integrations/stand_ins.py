"""Stand-ins of the harnesses' classes, as strict as interfaces.json: the real names, parameters, abstract methods.

That file is data, read from the harnesses' sources at the commits it names.
"""

from __future__ import annotations

import abc
import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

INTERFACES = json.loads((Path(__file__).parent / "interfaces.json").read_text())
LMMS, KIT = INTERFACES["lmms_eval"], INTERFACES["vlmeval"]


def accepts(function: Any, names: list[str]) -> bool:
    """Whether a method takes these arguments, by position and by name."""
    signature = inspect.signature(function)
    try:
        signature.bind(None, *names)
        signature.bind(None, **dict.fromkeys(names))
    except TypeError:
        return False
    return True


def _abstract(name: str) -> Any:
    def method(self, *arguments):
        raise NotImplementedError(name)

    return abc.abstractmethod(method)


def lmms() -> type:
    """lmms_eval.api.model.lmms."""
    methods = {name: _abstract(name) for name in LMMS["lmms abstract"]}

    def __init__(self):  # noqa: N807
        self.task_dict = {}

    def clean(self):
        self.is_clean = True

    return abc.ABCMeta("lmms", (), {**methods, "__init__": __init__, "clean": clean, "is_simple": True})


class BaseModel:
    """vlmeval.vlm.base.BaseModel, as far as a model of images comes through it."""

    INTERLEAVE = False
    allowed_types = ("text", "image", "video")

    def __init__(self):
        self.dump_image_func = None

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types
            assert Path(item["value"]).exists() == (item["type"] != "text")
        return self.generate_inner(message, dataset)

    def message_to_promptimg(self, message, dataset=None):
        assert not self.INTERLEAVE
        warnings.warn("the first image, and the texts together", stacklevel=2)
        images = [item["value"] for item in message if item["type"] == "image"]
        return "\n".join(item["value"] for item in message if item["type"] == "text"), next(iter(images), None)


def dataset_type(dataset: str) -> str:
    """vlmeval.dataset.DATASET_TYPE."""
    return {"MMBench_DEV_EN": "MCQ", "TextVQA_VAL": "VQA"}.get(dataset, "Y/N")


class Registry:
    """lmms_eval.models.MODEL_REGISTRY_V2."""

    def __init__(self):
        self.manifests = []

    def register_manifest(self, manifest, *, overwrite=False):
        assert overwrite
        self.manifests.append(manifest)


def _modules() -> dict[str, dict[str, Any]]:
    manifest = make_dataclass(
        "ModelManifest", [(name, object, None) for name in LMMS["ModelManifest"]], frozen=True
    )
    return {
        "lmms_eval": {},
        "lmms_eval.__main__": {"cli_evaluate": lambda: None},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms()},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": Registry()},
        "lmms_eval.models.registry_v2": {"ModelManifest": manifest},
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": {}},
        "vlmeval.dataset": {"DATASET_TYPE": dataset_type},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
    }


OURS = ("wemm.integrations.lmms_eval.model", "wemm.integrations.vlmevalkit.model")


@contextmanager
def installed() -> Iterator[pytest.MonkeyPatch]:
    """Both harnesses can be imported, and what of ours was built on them is forgotten behind it."""
    import sys

    with pytest.MonkeyPatch.context() as patch:
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        for name, contents in _modules().items():
            module = ModuleType(name)
            vars(module).update(contents)
            patch.setitem(sys.modules, name, module)
        yield patch
        for name in OURS:
            sys.modules.pop(name, None)
