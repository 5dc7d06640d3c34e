"""The scorecard: a service under attack, what must hold after every attack, a row for each item of the list."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
psutil = pytest.importorskip("psutil")
trustme = pytest.importorskip("trustme")

import ssl

from tests.server.conftest import IMAGES, QUESTIONS, Served, conversation, data_url
from tests.server.security.gallery import Gallery, response

CHECKLIST = {
    "S1": "Inward addresses are not dialled",
    "S2": "Redirects are followed three times, never inward",
    "S3": "Names are resolved once, and what was checked is dialled",
    "S4": "One reading of every URL",
    "S5": "What is fetched has limits of size and time",
    "S6": "Files below one directory and no others",
    "S7": "Images in data: URLs",
    "S8": "Odd sizes of images",
    "S9": "Images that grow when they are decoded",
    "S10": "Damaged images, and decoders kept busy",
    "S11": "Frames, pages and formats",
    "S12": "Colours are what they are",
    "S13": "Orientation",
    "S14": "JSON: size, depth, numbers, text",
    "S15": "Parameters out of range",
    "S16": "Control tokens that users spell",
    "S17": "Schemas and expressions",
    "S18": "Slow and many connections",
    "S19": "Clients that leave",
    "S20": "Keys",
    "S21": "Callers do not see each other in caches",
    "S22": "Hostile checkpoints",
    "S23": "Logs",
    "S24": "Web pages of strangers",
    "S25": "Nothing on the disk",
}
ALICE, BOB, ADMIN = "alice-0123456789", "bob-0123456789ab", "admin-0123456789"
MIB = 2**20
MAX_BODY, MAX_IMAGE, MAX_IMAGES = 8 * MIB, 2 * MIB, 4
DECODE_SECONDS = 3
PUBLIC = "93.184.215.14"
"""A public address, which the service finds to be the gallery."""
NAMES = {
    "public.example": [[PUBLIC]],
    "rebinding.example": [[PUBLIC], ["127.0.0.1"]],
    "mixed.example": [[PUBLIC, "127.0.0.1"]],
    "mixed6.example": [[PUBLIC, "::1"]],
    "inward.example": [["127.0.0.1"]],
    "metadata.example": [["169.254.169.254"]],
    "intranet.example": [["10.1.2.3"]],
    "mapped.example": [["::ffff:127.0.0.1"]],
    "nat64.example": [["64:ff9b::7f00:1"]],
    "6to4.example": [["2002:7f00:1::1"]],
}
_NETWORK = Path(__file__).parent / "network"
_ALLOWED_GROWTH = 0.05
_ALLOWED_CACHES = 32 * MIB
_SETTLING_SECONDS = 15


# --- the service and who talks to it -----------------------------------------------------------------


class Network:
    """What the service looks up and dials."""

    def __init__(self, directory: Path, routes: dict[str, int]) -> None:
        self._events = directory / "events"
        self._num_seen = 0
        self.directory = directory
        (directory / "names.json").write_text(json.dumps(NAMES))
        (directory / "routes.json").write_text(json.dumps(routes))
        self._events.touch()

    def news(self) -> list[dict[str, str]]:
        """Since the last call."""
        events = [json.loads(line) for line in self._events.read_text().splitlines()]
        new, self._num_seen = events[self._num_seen :], len(events)
        return new


class Wire:
    """A connection that sends what it is told and nothing else."""

    def __init__(self, url: str, receive_buffer: int | None = None) -> None:
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(60)
        host, port = url.removeprefix("http://").split(":")
        self._socket.connect((host, int(port)))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, size: int = 2**16, seconds: float = 60) -> bytes:
        """What has come, "" at the end. Raises TimeoutError."""
        self._socket.settimeout(seconds)
        return self._socket.recv(size)

    def rest(self, seconds: float = 60) -> bytes:
        """All that comes until the service closes. Raises TimeoutError."""
        data, deadline = b"", time.monotonic() + seconds
        with suppress(ConnectionError):
            while part := self.receive(seconds=max(0.01, deadline - time.monotonic())):
                data += part
        return data

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="session")
def gallery() -> Iterator[Gallery]:
    """Where the service may fetch from."""
    gallery = Gallery()
    gallery.pages["/word.png"] = response((IMAGES / "word.png").read_bytes())
    yield gallery
    gallery.close()


@pytest.fixture(scope="session")
def authority() -> Any:
    """Whose certificates the service trusts."""
    return trustme.CA()


@pytest.fixture(scope="session")
def secure_gallery(authority: Any) -> Iterator[Gallery]:
    """Another such, by https:."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    gallery = Gallery(context)
    yield gallery
    gallery.close()


@pytest.fixture(scope="session")
def network(tmp_path_factory: Any, gallery: Gallery) -> Network:
    return Network(tmp_path_factory.mktemp("network"), {f"{PUBLIC}:80": gallery.port})


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: Any) -> Path:
    """The directory that the service may read."""
    directory: Path = tmp_path_factory.mktemp("files") / "pictures"
    directory.mkdir()
    (directory / "word.png").write_bytes((IMAGES / "word.png").read_bytes())
    return directory


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: Any) -> Path:
    """Where the service would put temporary files."""
    directory: Path = tmp_path_factory.mktemp("scratch")
    return directory


@pytest.fixture(scope="session")
def guarded(
    gallery: Gallery,
    secure_gallery: Gallery,
    authority: Any,
    network: Network,
    pictures: Path,
    scratch: Path,
    tmp_path_factory: Any,
) -> Iterator[Served]:
    """The service under attack: everything is on that can be attacked."""
    trusted = tmp_path_factory.mktemp("trusted") / "authority.pem"
    authority.cert_pem.write_to_path(trusted)
    hosts = [f"private:127.0.0.1:{gallery.port}", f"private:127.0.0.1:{secure_gallery.port}", "*.example"]
    service = Served(
        *[f"--allowed-media-host={host}" for host in hosts],
        *[f"--api-key={key}" for key in (ALICE, BOB)],
        f"--admin-key={ADMIN}",
        "--management-port=0",
        f"--allowed-local-media-path={pictures}",
        f"--max-body-size={MAX_BODY}",
        f"--max-image-size={MAX_IMAGE}",
        f"--max-images={MAX_IMAGES}",
        f"--decode-timeout={DECODE_SECONDS}",
        "--kv-cache-memory=32MiB",  # which is resident when it has been used
        env={
            "PYTHONPATH": os.pathsep.join([str(_NETWORK), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "WEMM_TEST_NETWORK": str(network.directory),
            "SSL_CERT_FILE": str(trusted),
            "TMPDIR": str(scratch),
        },
    )
    try:
        yield service.wait_until_ready()
    finally:
        assert service.stop() == 0


@pytest.fixture(scope="session")
def warm(guarded: Served) -> dict[str, int]:
    """The footprint after requests of the kinds that attack it."""
    _warm_up(guarded)
    return footprint(guarded)


def _warm_up(service: Served) -> None:
    """What grows once and stays: decoders, threads, pools, grammars, the buffers of large bodies."""

    def ask(name: str) -> None:
        with service.client(headers={"X-API-Key": ALICE}, verify=False) as client:
            chat(client, conversation(name), response_format={"type": "json_object"}, max_tokens=8)
            chat(client, conversation(name), stream=True)
            chat(client, [{"role": "user", "content": "a " * (MAX_BODY // 4)}])
            chat(client, [{"role": "user", "content": "?"}], unknown=[{"a": 1}] * 60_000)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(ask, QUESTIONS))


@pytest.fixture(scope="session")
def alice(guarded: Served) -> Iterator[Any]:
    """A client with a key."""
    with guarded.client(headers={"Authorization": f"Bearer {ALICE}"}, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def bob(guarded: Served) -> Iterator[Any]:
    """Another, with another key."""
    with guarded.client(headers={"X-API-Key": BOB}, verify=False) as client:
        yield client


@pytest.fixture(scope="session")
def admin(guarded: Served) -> Iterator[Any]:
    """The operator."""
    with guarded.client(headers={"X-API-Key": ADMIN}, verify=False) as client:
        yield client


def chat(client: Any, messages: Any, **more: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 16, **more})


def about(url: str) -> list[dict[str, Any]]:
    """A question about the image at a URL, which stands in `messages[0].content[1].image_url`."""
    text = {"type": "text", "text": "What word is written here?"}
    return [{"role": "user", "content": [text, {"type": "image_url", "image_url": {"url": url}}]}]


def answer_about(client: Any, url: str, **more: Any) -> str:
    answered = chat(client, about(url), **more)
    assert answered.status_code == 200, answered.text
    text: str = answered.json()["choices"][0]["message"]["content"]
    return text


def refusal_of(client: Any, url: str) -> str:
    """Why a question about the image at a URL is refused, after the name of the part."""
    question = {"messages": about(url), "max_tokens": 16}
    answered = client.post("/v1/chat/completions", json=question, timeout=90)  # a fetch may take a minute
    assert answered.status_code == 400, answered.text
    error = answered.json()["error"]
    assert error["param"] == "messages[0].content[1].image_url"
    part, _, reason = error["message"].partition(": ")
    assert part == error["param"]
    return str(reason)


def figure(admin: Any, name: str) -> float:
    """The sum of a metric, `name` or `name{label="value"`."""
    lines = [line for line in admin.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)


# --- what must hold ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _unharmed(bob: Any) -> Iterator[None]:
    """After every attack the service is alive and reads an image right."""
    yield
    assert bob.get("/health").status_code == 200
    assert answer_about(bob, data_url("word.png")) == "WEMM"


@pytest.fixture(scope="module", autouse=True)
def _no_growth(guarded: Served, warm: dict[str, int]) -> Iterator[None]:
    """After all attacks of one kind every process is about as large as before, or as after the start."""
    before = {who: max(size, warm[who]) for who, size in footprint(guarded).items()}
    yield
    bounds = {who: (1 + _ALLOWED_GROWTH) * size + _ALLOWED_CACHES for who, size in before.items()}
    deadline = time.monotonic() + _SETTLING_SECONDS
    while any((now := footprint(guarded))[who] > bound for who, bound in bounds.items()):
        assert time.monotonic() < deadline, f"bytes before {before}, now {now}"
        time.sleep(0.2)


def footprint(service: Served) -> dict[str, int]:
    """Resident bytes of the front, the engine and all decoders."""
    front = psutil.Process(service.process.pid)
    sizes = {"front": front.memory_info().rss, "engine": 0, "decoders": 0}
    for child in front.children(recursive=True):
        with suppress(psutil.Error):
            who = "engine" if "wemm.engine.engine_host" in child.cmdline() else "decoders"
            sizes[who] += child.memory_info().rss
    return sizes


class Neighbour:
    """Somebody else who asks all the while, in a thread."""

    def __init__(self, service: Served) -> None:
        self.seconds: list[float] = []
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with self._service.client(headers={"X-API-Key": BOB}, verify=False) as client:
            client.timeout = 10
            while not self._stop.wait(0.05):
                started = time.monotonic()
                self.seconds.append(time.monotonic() - started if self._is_answered(client) else float("inf"))

    def _is_answered(self, client: Any) -> bool:
        for _ in range(2):  # an idle connection may close just when it is used again, which clients know
            with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
                with suppress(httpx.TimeoutException):
                    status: int = chat(client, [{"role": "user", "content": "?"}], max_tokens=2).status_code
                    return status == 200
                return False
        return False


@pytest.fixture
def neighbour(guarded: Served) -> Iterator[Neighbour]:
    """Whoever else asks meanwhile is answered within seconds."""
    with Neighbour(guarded) as neighbour:
        wait_until(lambda: bool(neighbour.seconds))
        yield neighbour
    assert max(neighbour.seconds) < 3


# --- the scorecard -----------------------------------------------------------------------------------

_outcomes: dict[str, dict[str, str]] = defaultdict(dict)
"""Item → test → how it ended."""
_num_checks: dict[str, int] = {}
"""Test → attacks in it, where it is more than one."""
_cases = pytest.StashKey[list[Any]]()


@pytest.fixture
def each(request: pytest.FixtureRequest) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """The cases of a test that makes several attacks: they are counted, and shown where one fails."""
    cases = request.node.stash.setdefault(_cases, [])

    def walk(given: Iterable[Any]) -> Iterator[Any]:
        for case in given:
            cases.append(case)
            yield case

    return walk


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scorecard", action="store_true", help="print a row per item of the security checklist")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    cases = item.stash.get(_cases, [])
    if cases:
        _num_checks[item.nodeid] = len(cases)
        if report.failed:
            report.sections.append(("case", f"{cases[-1]!r:.500}"))
    for marker in item.iter_markers("security"):
        for name in marker.args:
            if report.failed:
                _outcomes[name][item.nodeid] = "failed"
            elif report.when == "call" and report.passed:
                _outcomes[name].setdefault(item.nodeid, "passed")
    return report


def _row(name: str) -> tuple[int, bool]:
    """How many checks there were, and whether all passed."""
    ended = _outcomes[name]
    count = sum(_num_checks.get(test, 1) for test in ended)
    return count, bool(ended) and "failed" not in ended.values()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("--scorecard", default=False) and not all(_row(name)[1] for name in CHECKLIST):
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--scorecard", default=False):
        return
    terminalreporter.section("security scorecard")
    for name, title in CHECKLIST.items():
        count, passed = _row(name)
        verdict = "pass" if passed else "FAIL"
        terminalreporter.write_line(f"{name:4} {title:58} {count:4} checks  {verdict}", red=not passed)
    num_passed = sum(_row(name)[1] for name in CHECKLIST)
    terminalreporter.write_line(f"{num_passed} of {len(CHECKLIST)} items pass")
