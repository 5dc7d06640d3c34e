"""From addresses and certificates to the last answer after SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wemm.errors import EngineError, ParameterError

pytest.importorskip("uvicorn")
trustme = pytest.importorskip("trustme")

from tests.server.sockets import GET, Client, answer, application, assert_works, echo, respond, run, running
from wemm.server import listen
from wemm.server.connection import BoundedConnection, ConnectionLimits
from wemm.server.listen import Listener, TlsConfig

ROOT = Path(__file__).parents[2]


def _refused(*listeners, match, **options):
    """Nothing starts, and the message is for whoever typed the option."""

    async def test():
        with pytest.raises(ParameterError, match=match):
            async with running(*listeners, **options):
                pass

    run(test)


def test_an_address_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = []

        @application
        async def app(scope, receive, send):
            raise AssertionError

        async def noticed(scope, receive, send):
            started.append(scope["type"])
            await app(scope, receive, send)

        first, second = Listener(noticed, "127.0.0.1", 0), Listener(answer, "127.0.0.1", port)
        _refused(first, second, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*in use; stop what listens there")
        assert started == []


def test_an_address_that_somebody_else_took_between_binding_and_listening_is_named():
    async def test():
        with socket.socket() as early:
            early.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            early.bind(("127.0.0.1", 0))
            port = early.getsockname()[1]

            async def app(scope, receive, send):
                early.listen()
                await answer(scope, receive, send)

            with pytest.raises(ParameterError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
                async with running(Listener(app, "127.0.0.1", port)):
                    pass

    run(test)


@pytest.mark.parametrize("port", [-1, 65536, 1.5, True, None])
def test_a_port_out_of_range_is_refused(port):
    _refused(Listener(answer, "127.0.0.1", port), match="a port is an integer from 0 to 65535")


@pytest.mark.parametrize("host", ["", "a" * 300, "name.invalid"])
def test_an_unknown_host_is_refused(host, monkeypatch):
    def not_found(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host == "name.invalid":  # no name server is asked
        monkeypatch.setattr(socket, "getaddrinfo", not_found)
    _refused(Listener(answer, host, 0), match="has no address; give an IP address")


def test_an_address_of_another_machine_is_refused():
    _refused(Listener(answer, "192.0.2.1", 0), match="give an address of this machine")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0", "0x0", "::ffff:0.0.0.0", "::0"])
def test_all_networks_are_asked_for_expressly(host):
    _refused(Listener(answer, host, 0), match="--allow-public")


def test_all_networks_can_be_had():
    async def test():
        async with running(Listener(answer, "0.0.0.0", 0), allow_public=True) as [url]:
            assert url.startswith("http://0.0.0.0:")
            await assert_works(url.replace("0.0.0.0", "127.0.0.1"))

    run(test)


def test_a_name_is_served_at_all_its_addresses():
    async def test():
        async with running(Listener(answer, "localhost", 0)) as [url]:
            port = url.rpartition(":")[2]
            assert url == f"http://localhost:{port}"
            assert port != "0"
            for family, *_, address in socket.getaddrinfo("localhost", int(port), type=socket.SOCK_STREAM):
                await assert_works(f"http://{'[::1]' if family == socket.AF_INET6 else address[0]}:{port}")

    run(test)


def test_all_addresses_of_a_name_have_the_same_port(monkeypatch):
    def addresses(host, port, **options):
        hosts = ("127.0.0.1", "192.0.2.1", "127.0.0.2")
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in hosts]
        return found if host == "me" else known(host, port, **options)

    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", addresses)

    async def test():
        async with running(Listener(answer, "me", 0)) as [url]:
            for host in ("127.0.0.1", "127.0.0.2"):  # the address of another machine is left out
                await assert_works(url.replace("me", host))

    run(test)


def test_small_answers_do_not_wait_for_acknowledgements_and_large_ones_not_in_the_system(monkeypatch):
    made, options = BoundedConnection.connection_made, []

    def connection_made(self, transport):
        made(self, transport)
        accepted = transport.get_extra_info("socket")
        options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)
        options.append(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2**19)

    async def test():
        async with running(answer) as [url]:
            await assert_works(url)

    monkeypatch.setattr(BoundedConnection, "connection_made", connection_made)
    run(test)
    assert options == [True, True]


def test_a_port_can_be_had_again_at_once():
    async def test():
        port = 0
        for _ in range(2):
            async with running(Listener(answer, "127.0.0.1", port)) as [url]:
                port = int(url.rpartition(":")[2])
                async with await Client.connect(url) as client:
                    await client.send(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                    assert (await client.response())[0] == 200
                    assert await client.rest() == b""

    run(test)


def test_too_many_connections_for_the_process_are_refused(monkeypatch):
    limits = []
    monkeypatch.setattr(listen.resource, "getrlimit", lambda _: (100, 500))
    monkeypatch.setattr(listen.resource, "setrlimit", lambda _, value: limits.append(value))
    _refused(answer, limits=ConnectionLimits(max_connections=1000), match="--max-connections.*ulimit -n")

    async def test():
        async with running(answer, limits=ConnectionLimits(max_connections=10)) as [url]:
            await assert_works(url)

    run(test)
    assert limits == [(266, 500)]


def test_several_listeners_have_their_own_applications_and_the_first_has_the_lifespan():
    events = []

    def named(name):
        async def app(scope, receive, send):
            if scope["type"] == "lifespan":
                events.append(f"{name} up")
                scope["state"]["name"] = name
                await answer(scope, receive, send)
                events.append(f"{name} down")
            else:
                await respond(send, f"{name} {scope['state'].get('name')}".encode())

        return app

    async def test():
        async with running(named("one"), named("two")) as urls:
            assert events == ["one up"]
            for url, expected in zip(urls, (b"one one", b"two None"), strict=True):
                async with await Client.connect(url) as client:
                    await client.send(GET)
                    status, headers, body = await client.response()
                    assert (status, body) == (200, expected)
                    assert "date" in headers
                    assert "server" not in headers
        assert events == ["one up", "one down"]

    run(test)


def test_what_the_application_raises_in_its_startup_is_raised():
    async def broken(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "for the log"})
        raise EngineError("no weights")

    async def silent(scope, receive, send):
        await receive()

    async def test():
        with pytest.raises(EngineError, match="no weights"):
            async with running(broken):
                pass
        with pytest.raises(EngineError, match=r"ended in lifespan\.startup"):
            async with running(silent):
                pass

    run(test)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def certificate(authority, tmp_path):
    """certificate(**changes): TlsConfig with good files, but for the changes."""
    issued = authority.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o600)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def make(**changes):
        return TlsConfig(**{"certificate": tmp_path / "cert.pem", "key": tmp_path / "key.pem", **changes})

    return make


def _trust(authority, **options):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    for name, value in options.items():
        setattr(context, name, value)
    return context


def test_tls_1_2_and_1_3_work_and_older_does_not(authority, certificate):
    async def test():
        async with running(Listener(answer, "127.0.0.1", 0, certificate())) as [url]:
            assert url.startswith("https://127.0.0.1:")
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = _trust(authority, minimum_version=version, maximum_version=version)
                await assert_works(url, ssl=context)
            old = _trust(authority)
            old.set_ciphers("ALL:@SECLEVEL=0")
            with pytest.warns(DeprecationWarning, match="TLS"):
                old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await assert_works(url, ssl=old)
            async with await Client.connect(url) as plain:
                await plain.send(GET)
                assert not (await plain.rest()).startswith(b"HTTP")
            await assert_works(url, ssl=_trust(authority))

    run(test)


def test_clients_must_show_a_certificate_where_an_authority_is_given(authority, certificate, tmp_path):
    async def test():
        tls = certificate(client_ca=tmp_path / "ca.pem")
        async with running(Listener(answer, "127.0.0.1", 0, tls)) as [url]:
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await assert_works(url, ssl=_trust(authority))
            stranger = _trust(authority)
            trustme.CA().issue_cert("client@example.org").configure_cert(stranger)
            with pytest.raises((OSError, asyncio.IncompleteReadError)):
                await assert_works(url, ssl=stranger)
            known = _trust(authority)
            authority.issue_cert("client@example.org").configure_cert(known)
            await assert_works(url, ssl=known)

    run(test)


def test_a_handshake_that_never_ends_is_ended(authority, certificate):
    async def test():
        limits = ConnectionLimits(header_timeout=1.0)
        async with running(Listener(answer, "127.0.0.1", 0, certificate()), limits=limits) as [url]:
            async with await Client.connect(url) as client:
                assert await client.rest() == b""
            await assert_works(url, ssl=_trust(authority))

    run(test)


def test_a_client_that_does_not_read_is_left_also_with_tls(authority, certificate):
    ended = []

    @application
    async def endless(scope, receive, send):
        await receive()
        listener = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not listener.done():
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
            await asyncio.sleep(0)
        ended.append(listener.result()["type"])

    async def test():
        tls = certificate()
        limits = ConnectionLimits(write_timeout=0.3)
        async with running(Listener(endless, "127.0.0.1", 0, tls), limits=limits) as [url]:
            client = await Client.connect(url, ssl=_trust(authority), limit=2**10)
            await client.send(GET)
            while not ended:
                await asyncio.sleep(0.02)
            client.writer.transport.abort()
        assert ended == ["http.disconnect"]

    run(test)


def test_a_client_that_does_not_end_its_tls_is_left(authority, certificate):
    def fetch(url):
        port = int(url.rpartition(":")[2])
        raw = socket.create_connection(("127.0.0.1", port), timeout=20)
        secure = _trust(authority).wrap_socket(raw, server_hostname="127.0.0.1")
        secure.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert secure.recv(1000).startswith(b"HTTP/1.1 200")
        with socket.socket(fileno=secure.detach()) as deaf:
            deaf.settimeout(20)
            while deaf.recv(1000):
                pass

    async def test():
        limits = ConnectionLimits(write_timeout=0.3)
        async with running(Listener(answer, "127.0.0.1", 0, certificate()), limits=limits) as [url]:
            await asyncio.to_thread(fetch, url)

    run(test)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda path: (path / "cert.pem").unlink(), r"TLS certificate .*cert\.pem cannot be read: No such file"),
        (lambda path: (path / "key.pem").unlink(), r"TLS key .*key\.pem cannot be read: No such file"),
        (lambda path: (path / "ca.pem").unlink(), r"TLS client CA .*ca\.pem cannot be read: No such file"),
        (
            lambda path: (path / "key.pem").chmod(0o640),
            r"key\.pem is open to others \(mode 0640\); chmod 600 .*key",
        ),
        (
            lambda path: (path / "cert.pem").write_text("x"),
            r"TLS certificate .*cert\.pem holds no PEM certificate",
        ),
        (lambda path: (path / "ca.pem").write_text(""), r"TLS client CA .*ca\.pem holds no PEM certificate"),
        (lambda path: (path / "key.pem").write_text("x"), r"TLS key .*key\.pem is no PEM private key"),
        (
            lambda path: trustme.CA().issue_cert("b").private_key_pem.write_to_path(path / "key.pem"),
            r"key\.pem does not belong to certificate .*cert\.pem",
        ),
    ],
)
def test_the_tls_file_at_fault_is_named(certificate, tmp_path, damage, match):
    tls = certificate(client_ca=tmp_path / "ca.pem")
    damage(tmp_path)
    _refused(Listener(answer, "127.0.0.1", 0, tls), match=match)


def test_an_encrypted_key_needs_its_password_and_never_asks_a_terminal(authority, certificate, tmp_path):
    from cryptography.hazmat.primitives import serialization as pem

    key = pem.load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    encryption = pem.BestAvailableEncryption(b"open sesame")
    text = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.TraditionalOpenSSL, encryption)
    (tmp_path / "key.pem").write_bytes(text)
    for password in (None, "sesame"):
        tls = certificate(key_password=password)
        _refused(Listener(answer, "127.0.0.1", 0, tls), match="its password is missing or wrong")
    tls = certificate(key_password="open sesame")
    assert "sesame" not in repr(tls)

    async def test():
        async with running(Listener(answer, "127.0.0.1", 0, tls)) as [url]:
            await assert_works(url, ssl=_trust(authority))

    run(test)


SERVICE = """
import asyncio, sys
from tests.server.sockets import application, respond
from wemm.server.connection import ConnectionLimits
from wemm.server.listen import Listener, serve

@application
async def slow(scope, receive, send):
    if scope["path"] == "/slow":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await asyncio.sleep(float(sys.argv[2]))
        await send({"type": "http.response.body", "body": b"b"})
    else:
        await respond(send, b"ok")

async def with_lifespan_told(scope, receive, send):
    await slow(scope, receive, send)
    if scope["type"] == "lifespan":
        print("ended", flush=True)

listeners = [Listener(app, "127.0.0.1", 0) for app in (with_lifespan_told, slow)]
asyncio.run(serve(
    listeners, limits=ConnectionLimits(), drain_timeout=float(sys.argv[1]),
    on_started=lambda urls: print(*urls, flush=True), on_drain=lambda: print("draining", flush=True),
))
print("over", flush=True)
"""


class _Service:
    """SERVICE in a process of its own."""

    def __init__(self, drain_timeout, answer_seconds):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(drain_timeout), str(answer_seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["src", *sys.path])},
        )  # fmt: skip
        self._timer = threading.Timer(60, self.process.kill)

    def __enter__(self):
        self._timer.start()
        self.urls = self.process.stdout.readline().split()
        assert len(self.urls) == 2, self.process.stderr.read()
        return self

    def __exit__(self, *exception):
        self._timer.cancel()
        self.process.kill()
        self.process.communicate()

    def ends(self):
        """What it says after on_started, and that it complains of nothing."""
        out, err = self.process.communicate()
        assert (self.process.returncode, err) == (0, "")
        return out.split()


async def _begun(url):
    """A request that is half answered."""
    client = await Client.connect(url)
    await client.send(GET.replace(b"/ ", b"/slow "))
    await client.reader.readuntil(b"a\r\n")
    return client


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_takes_no_new_ones(number):
    async def test():
        with _Service(drain_timeout=30, answer_seconds=1.0) as service:
            for url in service.urls:
                await assert_works(url)
            idle = await Client.connect(service.urls[0])
            await idle.send(GET)
            assert (await idle.response())[0] == 200
            under_way = [await _begun(url) for url in service.urls]
            service.process.send_signal(number)
            assert await asyncio.to_thread(service.process.stdout.readline) == "draining\n"
            assert await idle.rest() == b""
            for url in service.urls:
                with pytest.raises(ConnectionError):
                    await Client.connect(url)
            for client in under_way:
                assert await client.rest() == b"1\r\nb\r\n0\r\n\r\n"
            assert await asyncio.to_thread(service.ends) == ["ended", "over"]
            for client in (idle, *under_way):
                await client.__aexit__()

    run(test)


@pytest.mark.parametrize("by", ["timeout", "second signal"])
def test_requests_that_do_not_finish_are_cut_off(by):
    async def test():
        with _Service(drain_timeout=0.2 if by == "timeout" else 600, answer_seconds=0.9) as service:
            client = await _begun(service.urls[1])
            service.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(service.process.stdout.readline) == "draining\n"
            if by == "second signal":
                service.process.send_signal(signal.SIGTERM)
            assert await client.rest() == b""
            assert await asyncio.to_thread(service.ends) == ["ended", "over"]
            await client.__aexit__()

    run(test)


def test_a_signal_during_startup_ends_it():
    async def loading(scope, receive, send):
        await receive()
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("loading")

    async def test():
        await listen.serve(
            [Listener(loading, "127.0.0.1", 0)],
            limits=ConnectionLimits(),
            drain_timeout=1,
            on_started=lambda _: ended.append("started"),
            on_drain=lambda: ended.append("draining"),
        )
        assert ended == ["loading"]

    ended = []
    run(test)


def test_an_application_that_does_not_end_is_left_after_a_second_signal(monkeypatch):
    monkeypatch.setattr("wemm.server.lifespan._HURRY_SECONDS", 0.05)

    async def stubborn(scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    async def test():
        await listen.serve(
            [Listener(stubborn, "127.0.0.1", 0)],
            limits=ConnectionLimits(),
            drain_timeout=1,
            on_started=lambda _: os.kill(os.getpid(), signal.SIGTERM),
            on_drain=lambda: None,
        )

    run(test)


def test_requests_are_cancelled_when_the_service_is():
    cancelled = []

    @application
    async def forever(scope, receive, send):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(scope["path"])

    async def test():
        async with running(forever, echo) as urls, await Client.connect(urls[0]) as client:
            await client.send(GET)
            await assert_works(urls[1])
        assert cancelled == ["/"]

    run(test)
