"""A MindIE service config.json → options of `wemm serve`, and what became of every key."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from wemm.config import format_bytes
from wemm.errors import ClientError, ParameterError
from wemm.server.body import parse_json
from wemm.server.mindie.config_keys import FAMILIES, KEYS, MODEL, SECTIONS, Key, Outcome

_MAX_SIZE = 10 * 2**20
_PATH_VARIABLE = "MIES_CONFIG_JSON_PATH"
_ADDRESS_VARIABLES = {
    "ServerConfig.ipAddress": "MIES_CONTAINER_IP",
    "ServerConfig.managementIpAddress": "MIES_CONTAINER_MANAGEMENT_IP",
}
_PLAIN_NAME = re.compile(r"\w+")
_MODEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,254}[A-Za-z0-9])?")
_SERVER, _DEPLOY, _SCHEDULE = "ServerConfig.", "BackendConfig.ModelDeployConfig.", "BackendConfig.ScheduleConfig."
_MODELS = MODEL.removesuffix("[0]")
_TLS_KEY = re.compile(r"ServerConfig\.(management|metrics)?[tT]ls\w+")
_ACCEPTED_PER_LINK = 3
_E2E_TIMEOUT = 600
_MAX_N = 128
_SIZES = ("max_body_size", "kv_cache_memory")
_MAX_SHOWN = 100


@dataclass(frozen=True)
class KeyUse:
    """What became of one key of the file."""

    key: str
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class ConfigFile:
    """What a file says in our own words."""

    server: dict[str, Any]
    """Fields of ServerConfig."""
    engine: dict[str, Any]
    """Fields of EngineConfig."""
    report: list[KeyUse]
    """One entry per key, in the order of the file."""


def read_config_file(path: Path | None = None) -> ConfigFile:
    """`path`: by default what MIES_CONFIG_JSON_PATH names. Raises ParameterError, which names the key."""
    if path is None:
        named = os.environ.get(_PATH_VARIABLE)
        if not named:
            raise ParameterError(f"no config file is given, and {_PATH_VARIABLE} names none")
        path = Path(named)
    return _Reader(path, _load(path)).read()


def report_table(report: list[KeyUse]) -> Table:
    """For a terminal: what is not honoured first."""
    styles: dict[Outcome, str] = {"not honoured": "yellow", "used": "green", "ignored": "dim"}
    table = Table(Column(overflow="fold"), Column(overflow="fold"), show_header=False, title="config.json")
    for outcome, style in styles.items():
        uses = [use for use in report if use.outcome == outcome]
        if uses:
            table.add_section()
            table.add_row(f"{outcome}: {len(uses)}", "", style=f"bold {style}")
        for use in uses:
            table.add_row(Text(use.key), Text(use.reason), style=style)
    return table


def _load(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_SIZE + 1)
    except (OSError, ValueError) as error:
        raise ParameterError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > _MAX_SIZE:
        raise ParameterError(f"{path} has more than {_MAX_SIZE} bytes; a config file has at most so many")
    try:
        content = parse_json(data)
    except ClientError as error:
        raise ParameterError(f"{path}: {str(error).replace('the body', 'the file')}") from None
    if not isinstance(content, dict):
        raise ParameterError(f"{path} must hold a JSON object. Given: {type(content).__name__}")
    return content


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Every key with its value, down to where objects end; a list without objects is a value."""
    if isinstance(value, dict) and (value or not key):
        for name, inner in value.items():
            plain = name if _PLAIN_NAME.fullmatch(name) else json.dumps(name, ensure_ascii=False)
            yield from _leaves(inner, f"{key}.{plain}" if key else plain)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{key}[{i}]")
    else:
        yield key, value


class _Reader:
    """Reads one file: key by key, then what several keys say together."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self._path = path
        self._values = dict(_leaves(content, ""))
        _check_sections(content)
        self._fields: dict[str, dict[str, Any]] = {"server": {}, "engine": {}}
        self._uses: dict[str, KeyUse] = {}

    def read(self) -> ConfigFile:
        for key, value in self._values.items():
            known = KEYS.get(key)
            if known is None:
                why = next((why for start, why in FAMILIES if key.startswith(start)), "not a key that is known")
                self._note(key, "ignored", why)
                continue
            _check(key, value, known)
            self._take(key, value, known)
        self._read_addresses()
        self._read_limits()
        self._read_model()
        if any(key.startswith(_SERVER) for key in self._values):
            self._read_tls()
        report = [self._uses[key] for key in self._values]
        return ConfigFile(self._fields["server"], self._fields["engine"], report)

    def _note(self, key: str, outcome: Outcome, reason: str) -> None:
        if key in self._values:
            self._uses[key] = KeyUse(key, outcome, reason)

    def _use(self, key: str, target: str, value: Any, more: str = "") -> None:
        if value is not None:
            section, name = target.split(".")
            self._fields[section][name] = value
        option = _option(target.partition(".")[2], value)
        self._note(key, "used", f"{option}: {more}" if more else option)

    def _take(self, key: str, value: Any, known: Key) -> None:
        if known.target:
            self._use(key, known.target, known.convert(value), known.more)
        elif known.ignored:
            asks_for_nothing = known.neutral is None or value in known.neutral
            self._note(key, "ignored" if asks_for_nothing else "not honoured", known.ignored)

    def _read_addresses(self) -> None:
        host = self._address("ServerConfig.ipAddress", "server.host")
        if (
            self._address("ServerConfig.managementIpAddress", "server.management_host") is None
            and host is not None
        ):
            self._fields["server"]["management_host"] = host

    def _address(self, key: str, target: str) -> str | None:
        variable = _ADDRESS_VARIABLES[key]
        named: str | None = os.environ.get(variable)
        value = named or self._values.get(key)
        if value is None:
            return None
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise _error(variable if named else key, "an IPv4 or IPv6 address", value) from None
        self._use(key, target, value)
        if named:
            self._note(key, "ignored", f"{variable} says {value}")
        return str(value)

    def _read_limits(self) -> None:
        get = self._values.get
        links, key = get(f"{_SERVER}maxLinkNum"), f"{_SERVER}maxLinkNum"
        if links is not None:
            accepted = links * _ACCEPTED_PER_LINK
            self._fields["server"]["max_connections"] = accepted
            self._use(
                key, "server.max_queued_requests", accepted, "and --max-connections; a third runs, the rest waits"
            )
        self._check_order()
        longest, seq_len = get(f"{_DEPLOY}maxInputTokenLen"), get(f"{_DEPLOY}maxSeqLen")
        is_bound = longest is not None and (seq_len is None or longest < seq_len - 1)
        self._judge(f"{_DEPLOY}maxInputTokenLen", not is_bound, "prompts have room up to maxSeqLen - 1")
        wait, whole = get(f"{_SERVER}tokenTimeout"), get(f"{_SERVER}e2eTimeout") or _E2E_TIMEOUT
        is_later = wait is not None and wait >= whole
        self._judge(f"{_SERVER}tokenTimeout", is_later, "one time limit holds, for the whole answer: e2eTimeout")
        most = get(f"{_SCHEDULE}maxN")
        self._judge(f"{_SCHEDULE}maxN", most is not None and most >= _MAX_N, f"n may be up to {_MAX_N}")

    def _judge(self, key: str, asks_for_nothing: bool, reason: str) -> None:
        self._note(key, "ignored" if asks_for_nothing else "not honoured", reason)

    def _check_order(self) -> None:
        for small, large in (
            (f"{_DEPLOY}maxInputTokenLen", f"{_SCHEDULE}maxPrefillTokens"),
            (f"{_SCHEDULE}maxIterTimes", f"{_DEPLOY}maxSeqLen"),
            (f"{_SCHEDULE}maxPrefillBatchSize", f"{_SCHEDULE}maxBatchSize"),
            (f"{_SCHEDULE}maxPreemptCount", f"{_SCHEDULE}maxBatchSize"),
        ):
            low, high = self._values.get(small), self._values.get(large)
            if low is not None and high is not None and low > high:
                raise _error(small, f"at most {large.rpartition('.')[2]}, {high}", low)

    def _read_model(self) -> None:
        name, path = self._values.get(f"{MODEL}.modelName"), self._values.get(f"{MODEL}.modelWeightPath")
        if name is not None and not _MODEL_NAME.fullmatch(name):
            rule = "1 to 256 letters, digits, '.', '_' and '-', the first and last a letter or digit"
            raise _error(f"{MODEL}.modelName", rule, name)
        if path == "":
            raise _error(f"{MODEL}.modelWeightPath", "the directory of the checkpoint", path)
        if self._values.get(f"{MODEL}.npuMemSize") == 0:
            raise _error(f"{MODEL}.npuMemSize", "-1 or above 0", 0)

    def _read_tls(self) -> None:
        is_on = self._values.get(f"{_SERVER}httpsEnabled", True)
        if not is_on:
            for key in self._values:
                if _TLS_KEY.fullmatch(key):
                    self._note(key, "ignored", "httpsEnabled is false")
            self._note(f"{_SERVER}httpsEnabled", "used", "plain HTTP")
            return
        authority = self._authority()
        self._use(f"{_SERVER}tlsCert", "server.tls_certificate", self._file("tlsCert", self._name("tlsCert")))
        self._use(f"{_SERVER}tlsPk", "server.tls_key", self._file("tlsPk", self._name("tlsPk")))
        self._use(f"{_SERVER}tlsCaPath", "server.tls_client_ca", authority)
        self._use(f"{_SERVER}tlsCaFile", "server.tls_client_ca", authority)
        self._note(f"{_SERVER}httpsEnabled", "used", "HTTPS; clients must show a certificate")

    def _authority(self) -> Path:
        key, names = f"{_SERVER}tlsCaFile", self._values.get(f"{_SERVER}tlsCaFile")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or not names[0]:
            raise _error(
                key, "a list of one file, which may hold several certificates (httpsEnabled is true)", names
            )
        return self._file("tlsCaFile", str(Path(self._values.get(f"{_SERVER}tlsCaPath", "")) / names[0]))

    def _name(self, name: str) -> str:
        value = self._values.get(f"{_SERVER}{name}")
        if not value:
            raise _error(f"{_SERVER}{name}", "a PEM file, or httpsEnabled false", value)
        return str(value)

    def _file(self, name: str, given: str) -> Path:
        """Relative to the directory of the installation, as MindIE reads it: the one that holds conf/."""
        directory = self._path.absolute().parent
        path = (directory.parent if directory.name == "conf" else directory) / given
        try:
            is_there = path.is_file()
        except (OSError, ValueError):
            is_there = False
        if not is_there:
            raise _error(f"{_SERVER}{name}", f"a PEM file, or httpsEnabled false; {path} is not there", given)
        return path


def _option(name: str, value: Any) -> str:
    spelled = name.replace("_", "-")
    if value is None or isinstance(value, bool):
        return f"--no-{spelled}" if value is False else f"--{spelled}"
    return f"--{spelled} {format_bytes(value) if name in _SIZES else value}"


def _check_sections(content: Mapping[str, Any]) -> None:
    for section in SECTIONS:
        value: Any = content
        for name in section.removesuffix("[0]").split("."):
            if name not in value:
                break
            value = value[name]
            if section == MODEL and name == "ModelConfig":
                if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
                    raise _error(_MODELS, "a list of one object: a service has one model", value)
            elif not isinstance(value, dict):
                raise _error(section, "an object", value)


def _check(key: str, value: Any, known: Key) -> None:
    rule = _rule(known)
    fits = isinstance(value, known.kind) and not (known.kind is int and isinstance(value, bool))
    if fits and known.low is not None and known.high is not None:
        fits = known.low <= value <= known.high
    if fits and known.choices:
        fits = type(value) in {type(choice) for choice in known.choices} and value in known.choices
    if not fits:
        raise _error(key, rule, value)


def _rule(known: Key) -> str:
    if known.choices:
        return f"one of {', '.join(map(json.dumps, known.choices))}"
    if known.kind is int:
        return f"an integer in [{known.low}, {known.high}]"
    return {bool: "true or false", str: "text", list: "a list"}[known.kind]


def _error(key: str, rule: str, value: Any) -> ParameterError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
    return ParameterError(f"{key} must be {rule}. Given: {shown}", key)
