"""Every key of a MindIE service config.json: what it may be, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["used", "ignored", "not honoured"]

_INT32_MAX = 2**31 - 1
_UINT32_MAX = 2**32 - 1
_PORT = (1024, 65535)


@dataclass(frozen=True)
class Key:
    """One key. With neither `target` nor `ignored` it says something together with others."""

    kind: type
    low: int | None = None
    high: int | None = None
    choices: tuple[Any, ...] = ()
    target: str = ""
    """Field that takes the value: `server.port`, `engine.block_size`."""
    convert: Callable[[Any], Any] = lambda value: value
    more: str = ""
    """What else is to be said of its use."""
    ignored: str = ""
    """Why it has no meaning here."""
    neutral: tuple[Any, ...] | None = None
    """Values that ask for nothing; others are not honoured, for the reason `ignored` gives."""


def _text(**fate: Any) -> Key:
    return Key(str, **fate)


def _flag(**fate: Any) -> Key:
    return Key(bool, **fate)


def _number(low: int, high: int = _INT32_MAX, **fate: Any) -> Key:
    return Key(int, low, high, **fate)


def _names(**fate: Any) -> Key:
    return Key(list, **fate)


_SPLIT = "prefill and decode are not split"
_NODES = "the model runs on one machine"
_ONE_TLS = "all planes use tlsCert, tlsPk and tlsCaFile"
_CRL = "there are no revocation lists: a revoked client certificate is accepted until it expires"
_PASSWORD = "there is no password: the key must not be encrypted"
_SCHEDULER = "the scheduler decides by itself"
_KMC = "keys are plain PEM files"

_SERVER = {
    "ipAddress": _text(),
    "managementIpAddress": _text(),
    "port": _number(*_PORT, target="server.port"),
    "managementPort": _number(*_PORT, target="server.management_port"),
    "metricsPort": _number(*_PORT, target="server.metrics_port"),
    "allowAllZeroIpListening": _flag(target="server.allow_public"),
    "maxLinkNum": _number(1, 4096),
    "httpsEnabled": _flag(),
    "fullTextEnabled": _flag(target="server.full_text"),
    "tlsCaPath": _text(),
    "tlsCaFile": _names(),
    "tlsCert": _text(),
    "tlsPk": _text(),
    "tlsPkPwd": _text(ignored=_PASSWORD, neutral=("",)),
    "tlsCrlPath": _text(ignored=_CRL, neutral=("",)),
    "tlsCrlFiles": _names(ignored=_CRL, neutral=([],)),
    **{
        f"{plane}Tls{name}": Key(kind, ignored=_ONE_TLS, neutral=())
        for plane in ("management", "metrics")
        for name, kind in (
            ("CaFile", list), ("Cert", str), ("Pk", str), ("PkPwd", str), ("CrlPath", str), ("CrlFiles", list),
        )
    },
    "kmcKsfMaster": _text(ignored=_KMC),
    "kmcKsfStandby": _text(ignored=_KMC),
    "inferMode": _text(choices=("standard", "dmi"), ignored=_SPLIT, neutral=("standard",)),
    "interCommTLSEnabled": _flag(ignored=_SPLIT),
    "interCommPort": _number(*_PORT, ignored=_SPLIT),
    "openAiSupport": _text(ignored="requests are read as vLLM reads them", neutral=("vllm",)),
    "tokenTimeout": _number(1, 3600),
    "e2eTimeout": _number(1, 65535, target="server.request_timeout", convert=float),
    "maxRequestLength": _number(1, 100, target="server.max_body_size", convert=lambda size: size * 2**20),
    "distDPServerEnabled": _flag(ignored=_NODES, neutral=(False,)),
    "layerwiseDisaggregated": _flag(ignored=_SPLIT, neutral=(False,)),
    "HealthCheckConfig.npuUsageThreshold": _number(0, 100, ignored="/health/timed draws a token, whatever is set"),
}  # fmt: skip

_BACKEND = {
    "backendName": _text(ignored="there is one engine"),
    "modelInstanceNumber": _number(1, 10, ignored="one instance is started; start more services", neutral=(1,)),
    "npuDeviceIds": _names(ignored="devices are chosen by --device and the driver's own variables"),
    "tokenizerProcessNumber": _number(1, 32, ignored="prompts are prepared in threads; see --decode-workers"),
    "multiNodesInferEnabled": _flag(ignored=_NODES, neutral=(False,)),
    "multiNodesInferPort": _number(*_PORT, ignored=_NODES),
    "interNodeTLSEnabled": _flag(ignored=_NODES),
}

_DEPLOY = {
    "maxSeqLen": _number(1, _UINT32_MAX, target="engine.max_model_len"),
    "maxInputTokenLen": _number(1, 4194304),
    "truncation": Key(
        object, choices=(-1, 0, 1, True, False), ignored="a prompt that is too long is refused", neutral=(0, False)
    ),
}

_MODEL = {
    "modelInstanceType": _text(
        choices=("Standard", "StandardMock"), target="engine.load_format",
        convert=lambda kind: "dummy" if kind == "StandardMock" else "auto",
    ),
    "modelName": _text(target="server.served_model_name"),
    "modelWeightPath": _text(target="engine.model"),
    "worldSize": _number(1, _UINT32_MAX, choices=(1, 2, 4, 8), target="engine.tensor_parallel_size"),
    "cpuMemSize": _number(0, _UINT32_MAX, ignored="nothing is swapped to the host", neutral=(0,)),
    "npuMemSize": _number(
        -1, target="engine.kv_cache_memory", convert=lambda size: None if size == -1 else size * 2**30,
        more="for the KV cache of every device; where it is -1, what is free decides",
    ),
    "backendType": _text(ignored="there is one backend per device"),
    "trustRemoteCode": _flag(ignored="code of a checkpoint is never run"),
}  # fmt: skip

_SCHEDULE = {
    "templateType": _text(choices=("Standard", "Mix"), ignored="prefill and decode always share steps"),
    "templateName": _text(ignored="there is one"),
    "cacheBlockSize": _number(1, 128, target="engine.block_size"),
    "maxPrefillBatchSize": _number(0, 819200, ignored="images of any number of requests go together"),
    "maxPrefillTokens": _number(1, 4194304, target="engine.max_num_batched_tokens"),
    "prefillTimeMsPerReq": _number(0, 1000, ignored=_SCHEDULER),
    "prefillPolicyType": _number(0, _UINT32_MAX, choices=(0,), ignored="first come, first served, by priority"),
    "decodeTimeMsPerReq": _number(0, 1000, ignored=_SCHEDULER),
    "decodePolicyType": _number(0, _UINT32_MAX, choices=(0,), ignored="first come, first served, by priority"),
    "maxBatchSize": _number(1, 819200, target="engine.max_num_seqs"),
    "maxIterTimes": _number(
        1, _UINT32_MAX, target="server.default_max_tokens", more="a request may ask for more",
    ),
    "maxPreemptCount": _number(0, 819200, ignored="answers are put back only when blocks run out"),
    "supportSelectBatch": _flag(ignored=_SCHEDULER),
    "maxQueueDelayMicroseconds": _number(500, 1000000, ignored="a request never waits for company"),
    "maxFirstTokenWaitTime": _number(0, 3600000, ignored=_SCHEDULER),
    "maxN": _number(1, 8192),
}  # fmt: skip

MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
KEYS: Mapping[str, Key] = {
    "Version": _text(ignored="every version is read alike"),
    "EnableDynamicAdjustTimeoutConfig": _flag(ignored="time limits do not change by themselves", neutral=(False,)),
    **{f"ServerConfig.{name}": key for name, key in _SERVER.items()},
    **{f"BackendConfig.{name}": key for name, key in _BACKEND.items()},
    **{f"BackendConfig.ModelDeployConfig.{name}": key for name, key in _DEPLOY.items()},
    **{f"{MODEL}.{name}": key for name, key in _MODEL.items()},
    **{f"BackendConfig.ScheduleConfig.{name}": key for name, key in _SCHEDULE.items()},
}
SECTIONS = (
    "ServerConfig", "ServerConfig.HealthCheckConfig", "BackendConfig", "BackendConfig.ModelDeployConfig", MODEL,
    "BackendConfig.ScheduleConfig", "LogConfig",
)  # fmt: skip
"""Keys whose value must be an object."""
FAMILIES: tuple[tuple[str, str], ...] = (
    ("ServerConfig.interComm", _SPLIT),
    ("ServerConfig.layerwiseDisaggregated", _SPLIT),
    ("BackendConfig.interNode", _NODES),
    ("BackendConfig.kvPoolConfig", "the KV cache stays in the memory of the device"),
    (f"{MODEL}.kv_", _SPLIT),
    (f"{MODEL}.async_scheduler_wait_time", _SCHEDULER),
    (f"{MODEL}.models", "the checkpoint's own config.json says it"),
    ("LogConfig", "the log is set by --log-level"),
)
"""Beginnings of keys that are not listed, and why they have no meaning here."""
