"""S25: what users send stays in memory; nothing is left on the disk, not even by processes that were killed."""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.server.conftest import IMAGES, QUESTIONS, conversation, data_url
from tests.server.security.conftest import about, chat, wait_until

pytestmark = [
    pytest.mark.security("S25"),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what a process has open is in /proc"),
]
_MODULES = {"engine": "wemm.engine.engine_host", "decoders": "wemm.processing.decode_worker"}


@pytest.fixture(autouse=True)
def _unharmed():
    """The service here is one of its own."""


@pytest.fixture(scope="module", autouse=True)
def _no_growth():
    """The same."""


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Where a service might leave something: all empty, all watched."""
    found = {name: tmp_path / name for name in ("temporary", "working", "home")}
    for directory in found.values():
        directory.mkdir()
    monkeypatch.chdir(found["working"])
    return found


@pytest.fixture
def service(places, serve, tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    (files / "word.png").write_bytes((IMAGES / "word.png").read_bytes())
    return serve(
        "--decode-workers=2",
        f"--allowed-local-media-path={files}",
        env={
            "TMPDIR": str(places["temporary"]),
            "HOME": str(places["home"]),
            "XDG_CACHE_HOME": str(places["home"] / "cache"),
        },
    ).wait_until_ready()


def processes(service, who=None):
    """The front and all below it, or those of one kind."""
    front = psutil.Process(service.process.pid)
    children = front.children(recursive=True)
    if who is None:
        return [front, *children]
    found = []
    for child in children:
        with suppress(psutil.Error):
            if _MODULES[who] in child.cmdline():
                found.append(child)
    return found


def open_files(service):
    """Path → how it is opened ("1" or "2" at the end: for writing), of all processes of the service.

    Without what they inherited from this process, whose output pytest may have put into a file.
    """
    inherited = {str(Path(f"/proc/self/fd/{i}").readlink()) for i in range(3)}
    found = {}
    for process in processes(service):
        directory = Path(f"/proc/{process.pid}")
        with suppress(FileNotFoundError, PermissionError):  # gone; or confined, and we are not root
            for link in (directory / "fd").iterdir():
                with suppress(FileNotFoundError):
                    flags = (directory / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0]
                    found[str(link.readlink())] = flags
    return {path: flags for path, flags in found.items() if path not in inherited}


def assert_nothing_left(places):
    left = [str(path) for directory in places.values() for path in directory.rglob("*")]
    assert not left


def assert_nothing_open(service, places):
    found = open_files(service)
    assert found
    deleted = [path for path in found if path.endswith(" (deleted)") and ".so" not in Path(path).name]
    assert not deleted
    watched = tuple(map(str, places.values()))
    temporary = (*watched, "/tmp/", "/var/tmp/", "/dev/shm/", "/memfd:", tempfile.gettempdir() + "/")
    assert not [path for path in found if path.startswith(temporary)]
    written = [path for path, flags in found.items() if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY]
    assert not [path for path in written if path.startswith("/") and not path.startswith("/dev/")]


def ask(service, name, **more):
    with service.client() as client:
        return chat(client, conversation(name), **more)


def burst(service, num_rounds=4):
    """Images of all kinds from many at once: right, damaged, large, from the disk, streamed. Statuses."""
    url = data_url("shapes.png")
    bad = [url[: len(url) // 2], "data:image/png;base64,AAAA", "data:image/tiff;base64,SUkqAAgAAAA="]

    def one(i):
        name = list(QUESTIONS)[i % len(QUESTIONS)]
        with service.client() as client:
            return [
                chat(client, conversation(name), stream=i % 2 == 0).status_code,
                chat(client, about(f"file://{Path.cwd().parent}/files/word.png")).status_code,
                *[chat(client, about(item)).status_code for item in bad],
                chat(client, [{"role": "user", "content": "long " * 100_000}]).status_code,
            ]

    with ThreadPoolExecutor(4) as pool:
        return [status for statuses in pool.map(one, range(num_rounds)) for status in statuses]


def test_images_leave_nothing(guarded, bob, scratch):
    """Nor has anything that attacked this service before."""
    for name in QUESTIONS:
        assert chat(bob, conversation(name)).status_code == 200
        assert chat(bob, about(data_url(name)[:-400])).status_code == 400
    assert_nothing_left({"temporary": scratch})
    assert_nothing_open(guarded, {"temporary": scratch})


@pytest.mark.slow
def test_images_leave_nothing_and_neither_do_killed_processes(service, places):
    assert set(burst(service)) == {200, 400}
    assert_nothing_left(places)
    assert_nothing_open(service, places)

    # Decoders that are killed, in the middle of an image if it comes so.
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(burst, service)
        killed = 0
        while not answers.done():
            for decoder in processes(service, "decoders"):
                with suppress(psutil.NoSuchProcess):
                    decoder.kill()
                    killed += 1
            with suppress(psutil.NoSuchProcess):
                processes(service)[0].cpu_percent(0.2)
    assert killed
    # 500: where one was killed that had not begun to read images.
    assert set(answers.result()) <= {200, 400, 500}
    assert ask(service, "word.png").json()["choices"][0]["message"]["content"] == "WEMM"
    assert_nothing_left(places)
    assert_nothing_open(service, places)

    # The engine, with questions under way.
    with ThreadPoolExecutor(3) as pool:
        more = {"max_tokens": 500, "ignore_eos": True, "repetition_guard": False}
        answers = [pool.submit(ask, service, name, **more) for name in QUESTIONS]
        [engine] = processes(service, "engine")
        with service.client() as client:
            wait_until(lambda: 'wemm_requests_running{model_name="nano"} 0.0' not in client.get("/metrics").text)
        engine.kill()
        assert {answer.result().status_code for answer in answers} <= {200, 503}
    assert_nothing_left(places)
    service.wait_until_ready()
    assert ask(service, "word.png").json()["choices"][0]["message"]["content"] == "WEMM"
    assert_nothing_open(service, places)

    # At last the service itself, and all that it started goes with it.
    below = processes(service)[1:]
    assert below
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not any(process.is_running() for process in below))
    assert_nothing_left(places)


@pytest.mark.slow
def test_a_service_that_ends_leaves_nothing(service, places):
    assert set(burst(service, 2)) == {200, 400}
    assert service.stop() == 0
    assert_nothing_left(places)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process can be read on Linux only")
def test_decoders_cannot_write_files(service):
    assert ask(service, "word.png").status_code == 200
    decoders = processes(service, "decoders")
    assert decoders
    for decoder in decoders:
        assert decoder.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert decoder.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
        assert decoder.rlimit(psutil.RLIMIT_CORE) == (0, 0)
