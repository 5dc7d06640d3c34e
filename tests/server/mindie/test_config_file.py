"""A MindIE config.json: every key finds its place or its reason, and what is wrong is named."""

from __future__ import annotations

import copy
import json

import pytest

pytest.importorskip("fastapi")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from wemm.config import EngineConfig
from wemm.errors import ParameterError
from wemm.server.config import ServerConfig
from wemm.server.mindie.config_file import read_config_file, report_table

DEFAULT = {
    "Version": "1.0.0",
    "ServerConfig": {
        "ipAddress": "127.0.0.1",
        "managementIpAddress": "127.0.0.2",
        "port": 1025,
        "managementPort": 1026,
        "metricsPort": 1027,
        "allowAllZeroIpListening": False,
        "maxLinkNum": 1000,
        "httpsEnabled": True,
        "fullTextEnabled": False,
        "tlsCaPath": "security/ca/",
        "tlsCaFile": ["ca.pem"],
        "tlsCert": "security/certs/server.pem",
        "tlsPk": "security/keys/server.key.pem",
        "tlsCrlPath": "security/certs/",
        "tlsCrlFiles": ["server_crl.pem"],
        "managementTlsCaFile": ["management_ca.pem"],
        "managementTlsCert": "security/certs/management/server.pem",
        "managementTlsPk": "security/keys/management/server.key.pem",
        "metricsTlsCaFile": ["metrics_ca.pem"],
        "inferMode": "standard",
        "interCommTLSEnabled": True,
        "interCommPort": 1121,
        "interCommTlsCaPath": "security/grpc/ca/",
        "openAiSupport": "vllm",
        "tokenTimeout": 600,
        "e2eTimeout": 600,
        "maxRequestLength": 40,
        "distDPServerEnabled": False,
        "layerwiseDisaggregatedCrtlPort": [10001, 10002],
        "HealthCheckConfig": {"npuUsageThreshold": 0},
    },
    "BackendConfig": {
        "backendName": "mindieservice_llm_engine",
        "modelInstanceNumber": 1,
        "npuDeviceIds": [[0, 1, 2, 3]],
        "tokenizerProcessNumber": 8,
        "multiNodesInferEnabled": False,
        "multiNodesInferPort": 1120,
        "interNodeTLSEnabled": True,
        "interNodeTlsCaFiles": ["ca.pem"],
        "kvPoolConfig": {"backend": "", "configPath": ""},
        "ModelDeployConfig": {
            "maxSeqLen": 2560,
            "maxInputTokenLen": 2048,
            "truncation": False,
            "ModelConfig": [
                {
                    "modelInstanceType": "Standard",
                    "modelName": "wemm",
                    "modelWeightPath": "/data/WeMM-Chat-2k-CN",
                    "worldSize": 4,
                    "cpuMemSize": 5,
                    "npuMemSize": -1,
                    "backendType": "atb",
                    "trustRemoteCode": False,
                    "kv_trans_timeout": 10,
                    "models": {"layerwiseDisaggregatedMasterDeviceNum": 2},
                }
            ],
        },
        "ScheduleConfig": {
            "templateType": "Standard",
            "templateName": "Standard_LLM",
            "cacheBlockSize": 128,
            "maxPrefillBatchSize": 50,
            "maxPrefillTokens": 8192,
            "prefillTimeMsPerReq": 150,
            "prefillPolicyType": 0,
            "decodeTimeMsPerReq": 50,
            "decodePolicyType": 0,
            "maxBatchSize": 200,
            "maxIterTimes": 512,
            "maxPreemptCount": 0,
            "supportSelectBatch": False,
            "maxQueueDelayMicroseconds": 5000,
            "maxFirstTokenWaitTime": 2500,
            "maxN": 128,
        },
    },
    "LogConfig": {"dynamicLogLevel": "", "dynamicLogLevelValidHours": 2},
    "EnableDynamicAdjustTimeoutConfig": False,
}
MODEL = "BackendConfig.ModelDeployConfig.ModelConfig[0]"
ABSENT = object()
OUTCOMES = ("not honoured", "used", "ignored")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in ("MIES_CONTAINER_IP", "MIES_CONTAINER_MANAGEMENT_IP", "MIES_CONFIG_JSON_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path):
    """write({"ServerConfig.port": 80}): the default file without TLS, with changes; ABSENT deletes."""
    (tmp_path / "conf").mkdir()
    path = tmp_path / "conf/config.json"

    def make(changes=None):
        content = copy.deepcopy(DEFAULT)
        for key, value in {"ServerConfig.httpsEnabled": False, **(changes or {})}.items():
            *outer, last = key.replace("[0]", ".0").split(".")
            target = content
            for name in outer:
                target = target[int(name) if name == "0" else name]
            if value is ABSENT:
                del target[last]
            else:
                target[last] = value
        path.write_text(json.dumps(content))
        return path

    return make


def _num_leaves(value):
    if isinstance(value, dict) and value:
        return sum(map(_num_leaves, value.values()))
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return sum(map(_num_leaves, value))
    return 1


def _keys(value, key=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield f"{key}{name}"
            yield from _keys(inner, f"{key}{name}.")


def _tls_files(directory):
    for name in ("ca/ca.pem", "certs/server.pem", "keys/server.key.pem"):
        file = directory / "security" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("PEM")


def test_the_default_file_becomes_options(write):
    file = read_config_file(write())
    assert file.server == {
        "host": "127.0.0.1", "management_host": "127.0.0.2", "port": 1025, "management_port": 1026,
        "metrics_port": 1027, "allow_public": False, "max_connections": 3000, "max_queued_requests": 3000,
        "full_text": False, "request_timeout": 600.0, "max_body_size": 40 * 2**20, "served_model_name": "wemm",
        "default_max_tokens": 512,
    }  # fmt: skip
    assert file.engine == {
        "model": "/data/WeMM-Chat-2k-CN", "max_model_len": 2560, "max_num_seqs": 200, "block_size": 128,
        "max_num_batched_tokens": 8192, "tensor_parallel_size": 4, "load_format": "auto",
    }  # fmt: skip
    ServerConfig(**file.server)
    EngineConfig(**file.engine)


def test_every_key_of_the_file_is_reported_once(write):
    report = read_config_file(write({"BackendConfig.colour": "red", "new": {"part": [1], "a.b": {}}})).report
    keys = [use.key for use in report]
    assert len(keys) == len(set(keys))
    assert {
        "BackendConfig.colour", "new.part", 'new."a.b"', "BackendConfig.kvPoolConfig.backend",
        f"{MODEL}.worldSize",
    } < set(keys)  # fmt: skip
    assert len(keys) == _num_leaves(DEFAULT) + 3
    assert all(use.reason for use in report)
    outcomes = {use.key: use.outcome for use in report}
    assert outcomes["BackendConfig.colour"] == "ignored"
    assert outcomes["ServerConfig.port"] == outcomes["ServerConfig.maxLinkNum"] == "used"
    assert {key for key, outcome in outcomes.items() if outcome == "not honoured"} == {
        "BackendConfig.ModelDeployConfig.maxInputTokenLen", f"{MODEL}.cpuMemSize",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "outcome", "reason"),
    [
        ("BackendConfig.ModelDeployConfig.maxInputTokenLen", 2559, "ignored", "up to maxSeqLen - 1"),
        ("BackendConfig.ModelDeployConfig.truncation", 1, "not honoured", "too long is refused"),
        ("ServerConfig.tokenTimeout", 30, "not honoured", "e2eTimeout"),
        ("ServerConfig.inferMode", "dmi", "not honoured", "not split"),
        ("ServerConfig.openAiSupport", "openai", "not honoured", "as vLLM reads them"),
        ("BackendConfig.modelInstanceNumber", 2, "not honoured", "start more services"),
        ("BackendConfig.ScheduleConfig.maxN", 4, "not honoured", "up to 128"),
        ("BackendConfig.ScheduleConfig.maxIterTimes", 7, "used", "--default-max-tokens"),
        (f"{MODEL}.modelInstanceType", "StandardMock", "used", "--load-format"),
        ("ServerConfig.managementTlsCert", "x", "ignored", "httpsEnabled is false"),
    ],
)
def test_what_becomes_of_a_value(write, key, value, outcome, reason):
    [use] = [use for use in read_config_file(write({key: value})).report if use.key == key]
    assert use.outcome == outcome
    assert reason in use.reason


def test_values_that_are_translated(write):
    changes = {
        f"{MODEL}.npuMemSize": 8,
        f"{MODEL}.modelInstanceType": "StandardMock",
        "ServerConfig.maxLinkNum": 1,
    }
    file = read_config_file(write(changes))
    assert file.engine["kv_cache_memory"] == 8 * 2**30
    assert file.engine["load_format"] == "dummy"
    assert file.server["max_queued_requests"] == file.server["max_connections"] == 3


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("ServerConfig.port", 80, "an integer in [1024, 65535]. Given: 80"),
        ("ServerConfig.port", "1025", 'an integer in [1024, 65535]. Given: "1025"'),
        ("ServerConfig.port", True, "an integer in [1024, 65535]. Given: true"),
        ("ServerConfig.maxLinkNum", 4097, "an integer in [1, 4096]. Given: 4097"),
        ("ServerConfig.maxRequestLength", 101, "an integer in [1, 100]"),
        ("ServerConfig.e2eTimeout", 0, "an integer in [1, 65535]"),
        ("ServerConfig.e2eTimeout", 1.5, "an integer in [1, 65535]. Given: 1.5"),
        ("ServerConfig.allowAllZeroIpListening", 1, "true or false. Given: 1"),
        ("ServerConfig.ipAddress", "localhost", 'an IPv4 or IPv6 address. Given: "localhost"'),
        ("ServerConfig.ipAddress", None, "text. Given: null"),
        ("ServerConfig.inferMode", "split", 'one of "standard", "dmi"'),
        ("ServerConfig.HealthCheckConfig", 3, "an object. Given: 3"),
        ("ServerConfig", None, "an object. Given: null"),
        ("BackendConfig", [], "an object. Given: []"),
        ("BackendConfig.ModelDeployConfig.maxSeqLen", 0, "an integer in [1, 4294967295]"),
        ("BackendConfig.ModelDeployConfig.truncation", 2, "one of -1, 0, 1, true, false. Given: 2"),
        ("BackendConfig.ModelDeployConfig.ModelConfig", [], "a list of one object"),
        ("BackendConfig.ModelDeployConfig.ModelConfig", [{}, {}], "a list of one object: a service has one model"),
        (f"{MODEL}.worldSize", 3, "one of 1, 2, 4, 8. Given: 3"),
        (f"{MODEL}.npuMemSize", 0, "-1 or above 0"),
        (f"{MODEL}.npuMemSize", -2, "an integer in [-1, 2147483647]"),
        (f"{MODEL}.modelName", "-wemm", "the first and last a letter or digit"),
        (f"{MODEL}.modelWeightPath", "", "the directory of the checkpoint"),
        ("BackendConfig.ScheduleConfig.cacheBlockSize", 129, "an integer in [1, 128]"),
        ("BackendConfig.ScheduleConfig.maxIterTimes", 2561, "at most maxSeqLen, 2560. Given: 2561"),
        ("BackendConfig.ScheduleConfig.maxPreemptCount", 201, "at most maxBatchSize, 200. Given: 201"),
        ("BackendConfig.ScheduleConfig.prefillPolicyType", 1, "one of 0. Given: 1"),
    ],
)
def test_a_mistake_names_key_value_and_rule(write, key, value, rule):
    with pytest.raises(ParameterError) as raised:
        read_config_file(write({key: value}))
    assert str(raised.value).startswith(f"{key} must be ")
    assert rule in str(raised.value)
    assert raised.value.param == key


def test_a_step_must_have_room_for_the_longest_prompt(write):
    with pytest.raises(
        ParameterError, match=r"maxInputTokenLen must be at most maxPrefillTokens, 1024. Given: 2048"
    ):
        read_config_file(write({"BackendConfig.ScheduleConfig.maxPrefillTokens": 1024}))


def test_tls_files_lie_below_the_installation(write, tmp_path):
    _tls_files(tmp_path)
    file = read_config_file(write({"ServerConfig.httpsEnabled": True}))
    security = tmp_path / "security"
    assert file.server["tls_certificate"] == security / "certs/server.pem"
    assert file.server["tls_key"] == security / "keys/server.key.pem"
    assert file.server["tls_client_ca"] == security / "ca/ca.pem"
    uses = {use.key: use for use in file.report}
    assert uses["ServerConfig.tlsCaFile"].outcome == uses["ServerConfig.httpsEnabled"].outcome == "used"
    assert uses["ServerConfig.tlsCrlFiles"].outcome == "not honoured"
    assert "revoked" in uses["ServerConfig.tlsCrlFiles"].reason
    assert uses["ServerConfig.managementTlsCert"].outcome == "not honoured"


def test_tls_is_on_unless_the_file_says_no(write, tmp_path):
    with pytest.raises(
        ParameterError, match=r"tlsCaFile must be a PEM file, or httpsEnabled false; .*ca.pem is not"
    ):
        read_config_file(write({"ServerConfig.httpsEnabled": ABSENT}))
    _tls_files(tmp_path)
    assert "tls_key" in read_config_file(write({"ServerConfig.httpsEnabled": ABSENT})).server


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("tlsCert", ABSENT, "a PEM file, or httpsEnabled false. Given: null"),
        ("tlsPk", "security/none.pem", "security/none.pem is not there"),
        ("tlsPk", "security\0/none.pem", "is not there"),
        ("tlsCaFile", ["a.pem", "b.pem"], "one file, which may hold several certificates"),
        ("tlsCaFile", [], "a list of one file"),
        ("tlsCaFile", "ca.pem", 'a list. Given: "ca.pem"'),
    ],
)
def test_https_without_its_files_is_an_error(write, tmp_path, key, value, rule):
    _tls_files(tmp_path)
    with pytest.raises(ParameterError) as raised:
        read_config_file(write({"ServerConfig.httpsEnabled": True, f"ServerConfig.{key}": value}))
    assert rule in str(raised.value)
    assert raised.value.param == f"ServerConfig.{key}"


def test_addresses_of_the_container_win(write, monkeypatch):
    monkeypatch.setenv("MIES_CONTAINER_IP", "10.0.0.1")
    monkeypatch.setenv("MIES_CONTAINER_MANAGEMENT_IP", "::1")
    file = read_config_file(write())
    assert (file.server["host"], file.server["management_host"]) == ("10.0.0.1", "::1")
    [use] = [use for use in file.report if use.key == "ServerConfig.ipAddress"]
    assert (use.outcome, use.reason) == ("ignored", "MIES_CONTAINER_IP says 10.0.0.1")
    monkeypatch.setenv("MIES_CONTAINER_IP", "here")
    with pytest.raises(ParameterError, match="MIES_CONTAINER_IP must be an IPv4 or IPv6 address"):
        read_config_file(write())


def test_the_management_plane_is_where_the_service_is_if_nothing_else_is_said(write):
    file = read_config_file(
        write({"ServerConfig.managementIpAddress": ABSENT, "ServerConfig.ipAddress": "10.1.1.1"})
    )
    assert file.server["management_host"] == "10.1.1.1"


def test_the_path_may_come_from_the_environment(write, monkeypatch):
    with pytest.raises(ParameterError, match="MIES_CONFIG_JSON_PATH names none"):
        read_config_file()
    monkeypatch.setenv("MIES_CONFIG_JSON_PATH", str(write()))
    assert read_config_file().server["port"] == 1025


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object. Given: list"),
        (b'{"Version": "1", "Version": "2"}', "Version"),
        (b"\xff", "config.json"),
        (b" " * (10 * 2**20 + 1), "more than 10485760 bytes"),
    ],
)
def test_a_file_that_is_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=message):
        read_config_file(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ParameterError, match="none.json cannot be read: No such file"):
        read_config_file(tmp_path / "none.json")
    with pytest.raises(ParameterError, match="cannot be read: Is a directory"):
        read_config_file(tmp_path)


def test_an_empty_object_says_nothing(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    file = read_config_file(path)
    assert (file.server, file.engine, file.report) == ({}, {}, [])


def test_the_table_shows_every_key_and_what_is_not_honoured_first(write):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report_table(read_config_file(write()).report))
    lines = capture.get().splitlines()
    assert "ServerConfig.metricsPort" in capture.get()
    assert "--metrics-port 1027" in capture.get()
    numbers = [next(i for i, line in enumerate(lines) if f" {outcome}: " in line) for outcome in OUTCOMES]
    assert numbers == sorted(numbers)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["127.0.0.1", "Standard", "security/ca", "wemm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = sorted(_keys(DEFAULT))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), st.booleans())
def test_whatever_the_file_says_only_a_clear_error_comes_out(tmp_path, changes, keeps_default):
    content = copy.deepcopy(DEFAULT) if keeps_default else {}
    content.setdefault("ServerConfig", {})["httpsEnabled"] = False
    for key, value in changes.items():
        *outer, last = key.split(".")
        target = content
        for name in outer:
            if not isinstance(target.get(name), dict):
                target[name] = {}
            target = target[name]
        target[last] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    try:
        file = read_config_file(path)
    except ParameterError as error:
        assert str(error)
        return
    assert len(file.report) == _num_leaves(content)
    ServerConfig(**file.server)
    try:
        EngineConfig(**{"model": "nano", **file.engine})
    except ParameterError as error:
        assert str(error)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=64))
def test_bytes_of_any_kind(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    try:
        read_config_file(path)
    except ParameterError as error:
        assert str(error)
