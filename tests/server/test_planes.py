"""The planes of a service, each at its own address, behind TLS and keys."""

from __future__ import annotations

import ssl

import httpx
import pytest
import trustme

from tests.server.conftest import conversation

USER, OTHER, ADMIN = "user-key-0123456789", "other-key-0123456789", "admin-key-0123456789"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority, tmp_path_factory):
    """Paths of the server's certificate, its key and the authority."""
    directory = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    paths = [directory / name for name in ("server.pem", "server.key", "ca.pem")]
    certificate.cert_chain_pems[0].write_to_path(paths[0])
    certificate.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    paths[1].chmod(0o600)
    return paths


def _context(authority, with_certificate=True):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if with_certificate:
        authority.issue_cert("client@example.org").configure_cert(context)
    return context


def _bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def planes(serve_module, files):
    certificate, key, ca = files
    service = serve_module(
        "--management-port", "0", "--metrics-port", "0", "--api-key", USER, "--api-key", OTHER,
        "--admin-key", ADMIN, "--tls-certificate", str(certificate), "--tls-key", str(key),
        "--tls-client-ca", str(ca),
    )  # fmt: skip
    assert len(service.urls) == 3
    assert all(url.startswith("https://127.0.0.1:") for url in service.urls)
    return service


@pytest.fixture(scope="module")
def client(planes, authority):
    context = _context(authority)
    planes.wait_until_ready(verify=context)
    with httpx.Client(verify=context, timeout=60) as client:
        yield client


def test_without_a_client_certificate_nobody_is_heard(planes, client, authority):
    with (
        httpx.Client(verify=_context(authority, with_certificate=False), timeout=60) as stranger,
        pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)),
    ):
        stranger.get(f"{planes.url}/health")
    assert client.get(f"{planes.url}/health").status_code == 200


def test_users_ask_and_operators_watch(planes, client):
    business, management, metrics = planes.urls
    body = {"messages": conversation("word.png")}
    route = f"{business}/v1/chat/completions"
    assert client.post(route, json=body).status_code == 401
    assert client.post(route, json=body, headers=_bearer("wrong-key-0123456789")).status_code == 401
    answer = client.post(route, json=body, headers=_bearer(USER)).json()
    assert answer["choices"][0]["message"]["content"] == "WEMM"
    for page in (f"{business}/metrics", f"{metrics}/metrics", f"{management}/info"):
        assert client.get(page, headers=_bearer(USER)).status_code == 403, page
        assert client.get(page, headers=_bearer(ADMIN)).status_code == 200, page
    # What is on one plane is not on another.
    assert client.get(f"{metrics}/v1/models", headers=_bearer(ADMIN)).status_code == 404
    assert client.get(f"{business}/info", headers=_bearer(ADMIN)).status_code == 404


def test_callers_with_different_keys_share_no_cache(planes, client):
    route, body = f"{planes.url}/v1/chat/completions", {"messages": conversation("number.png")}

    def cached(key):
        usage = client.post(route, json=body, headers=_bearer(key)).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"] > 0

    assert [cached(USER), cached(USER), cached(OTHER), cached(OTHER)] == [False, True, False, True]


def test_operators_stop_the_service(planes, client):
    assert client.get(f"{planes.urls[1]}/stopService", headers=_bearer(USER)).status_code == 403
    assert client.get(f"{planes.urls[1]}/stopService", headers=_bearer(ADMIN)).status_code == 200
    assert planes.process.wait(60) == 0
