"""Every way in without a key, and with the wrong one."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

import pytest

from wemm.errors import ParameterError

pytest.importorskip("uvicorn")

from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from tests.server.sockets import Client, run, running
from wemm.server.auth import Authentication, read_api_keys

KEY, OTHER, ADMIN = "sk-0123456789abcdef", "sk-fedcba9876543210", "admin-0123456789abcdef"
BEARER = ("Authorization", f"Bearer {KEY}")
ALL = ["GET", "HEAD", "POST", "OPTIONS"]


def _caller(key):
    return hashlib.sha256(key.encode()).hexdigest()[:16]


async def _show(request):
    return JSONResponse({"caller": request.scope["state"]["caller"], "path": request.url.path})


def _app(keys=(KEY, OTHER), admin=ADMIN, **options):
    routes = [Route(path, _show, methods=ALL) for path in ("/health", "/v1/chat", "/admin/stop", "/v1/{name}")]
    return Authentication(
        Starlette(routes=routes),
        keys,
        admin,
        frozenset({"/health"}),
        lambda path: path.startswith("/admin"),
        **options,
    )


def _ask(app, *requests):
    """(method, target, headers) → (status, headers, body), each on a socket: clients send what they can."""
    answers = []

    async def test():
        async with running(app) as [url]:
            for method, target, *headers in requests:
                async with await Client.connect(url) as client:
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
                    await client.send(f"{method} {target} HTTP/1.1\r\nHost: a\r\n{lines}\r\n".encode("latin-1"))
                    if method == "HEAD":
                        head = await client.reader.readuntil(b"\r\n\r\n")
                        answers.append((int(head.split()[1]), {}, b""))
                    else:
                        answers.append(await client.response())

    run(test)
    return answers


def test_a_key_opens_and_names_its_caller():
    requests = [
        ("GET", "/v1/chat", header)
        for header in (
            BEARER, ("authorization", f"bearer  {KEY} "), ("AUTHORIZATION", f"BEARER {KEY}"), ("X-API-Key", KEY),
            ("X-API-Key", OTHER),
        )
    ]  # fmt: skip
    requests.append(("GET", "/v1/chat", BEARER, ("X-API-Key", KEY)))
    answers = _ask(_app(), *requests)
    assert [status for status, *_ in answers] == [200] * 6
    keys = [KEY, KEY, KEY, KEY, OTHER, KEY]
    assert [_caller(key).encode() in body for key, (_, _, body) in zip(keys, answers, strict=True)] == [True] * 6
    assert _caller(KEY) != _caller(OTHER)


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("Authorization", "Bearer"),),
        (("Authorization", "Bearer "),),
        (("Authorization", KEY),),
        (("Authorization", f"Basic {KEY}"),),
        (("Authorization", f"Bearer {KEY[:-1]}"),),
        (("Authorization", f"Bearer {KEY}x"),),
        (("Authorization", f"Bearer {KEY.upper()}"),),
        (("Authorization", f"Bearer {KEY} {KEY}"),),
        (("Authorization", f"Bearer {KEY}, Bearer {OTHER}"),),
        (("X-API-Key", ""),),
        (("X-API-Key", f"{KEY}\xff"),),
        (("X-API-Key", f"Bearer {KEY}"),),
        (("X-API-Key", _caller(KEY)),),
        (("X-Api-Token", KEY),),
        (("Cookie", f"api_key={KEY}"),),
        (BEARER, ("X-API-Key", OTHER)),
        (BEARER, ("Authorization", "Bearer wrong-key-wrong-key")),
    ],
)
def test_nothing_else_opens(headers):
    for status, answered, body in _ask(_app(), ("GET", "/v1/chat", *headers), ("POST", "/v1/chat", *headers)):
        assert status == 401
        assert answered["www-authenticate"] == "Bearer"
        assert KEY.encode() not in body
    [(status, *_)] = _ask(_app(), ("GET", "/v1/chat", BEARER))
    assert status == 200


def test_a_key_in_the_query_is_no_key():
    for name in ("api_key", "key", "X-API-Key", "Authorization", "access_token"):
        [(status, *_)] = _ask(_app(), ("GET", f"/v1/chat?{name}={KEY}"))
        assert status == 401


def test_methods_and_spellings_get_no_free_pass():
    answers = _ask(
        _app(),
        ("OPTIONS", "/v1/chat", ("Origin", "http://a"), ("Access-Control-Request-Method", "GET")),
        ("OPTIONS", "/v1/chat"), ("OPTIONS", "*"), ("HEAD", "/v1/chat"), ("TRACE", "/v1/chat"),
        ("GET", "/V1/chat"), ("GET", "/V1/Chat"),
        ("GET", "/v1/chat/"), ("GET", "/health/"), ("GET", "/Health"), ("GET", "/health2"), ("GET", "/nowhere"),
        ("POST", "/health"), ("OPTIONS", "/health"), ("DELETE", "/health"), ("GET", "/health;a"),
        ("GET", "/heal%E2%80%A6th"),
    )  # fmt: skip
    assert [status for status, *_ in answers] == [401] * len(answers)


@pytest.mark.parametrize(
    "target",
    [
        "//v1/chat", "/v1//chat", "/v1/chat//", "/health//", "//health", "/v1%2fchat", "/v1%2Fchat", "/%2Fv1/chat",
        "/v1/../admin/stop", "/health/../v1/chat", "/health/..", "/./health", "/v1/./chat", "/v1/%2e%2e/health",
        "/v1/.%2E/chat", "/health%00", "/v1/chat%00", "/health%0a", "/admin/stop%0A", "/admin/stop%0d",
        "/v1%5cchat", "/v1\\chat", "/v1/chat%7f", "http://a/health", "http://a//health", "/v1/..%5chealth",
    ],
)  # fmt: skip
def test_paths_with_two_readings_are_refused_before_anything_else(target):
    answers = _ask(_app(), ("GET", target), ("GET", target, BEARER), ("POST", target, ("X-API-Key", ADMIN)))
    assert [status for status, *_ in answers] == [400] * 3
    assert b"invalid_path" in answers[0][2]


def test_odd_but_harmless_paths_are_the_routers_affair():
    for target in ("/v1/%63hat", "/v1/a.b", "/v1/..a", "/v1/.a", "/v1/%E4%B8%AD", "/v1/a%252fb"):
        [(status, *_), (keyless, *_)] = _ask(_app(), ("GET", target, BEARER), ("GET", target))
        assert (status, keyless) == (200, 401)
    [(status, *_)] = _ask(_app(), ("GET", "/%68ealth"))
    assert status == 200


def test_open_paths_are_open_to_readers():
    answers = _ask(
        _app(), ("GET", "/health"), ("HEAD", "/health"), ("GET", "/health?a=b"), ("GET", "/health", BEARER)
    )
    assert [status for status, *_ in answers] == [200] * 4
    assert b'"caller":""' in answers[0][2]


def test_admin_paths_want_the_admin_key():
    requests = [("POST", "/admin/stop", *([("X-API-Key", key)] if key else [])) for key in (None, KEY, ADMIN)]
    answers = _ask(_app(), *requests, ("GET", "/v1/chat", ("X-API-Key", ADMIN)))
    assert [status for status, *_ in answers] == [401, 403, 200, 200]
    assert b"admin_key_required" in answers[1][2]
    assert _caller(ADMIN).encode() in answers[3][2]
    answers = _ask(_app(admin=None), *requests)
    assert [status for status, *_ in answers] == [401, 200, 401]


def test_without_keys_all_is_open_but_what_the_admin_key_guards():
    answers = _ask(_app(keys=()), ("GET", "/v1/chat"), ("GET", "/v1/chat", BEARER), ("GET", "/admin/stop"))
    assert [status for status, *_ in answers] == [200, 200, 401]
    assert b'"caller":""' in answers[1][2]
    [(status, *_)] = _ask(_app(keys=(), admin=None), ("GET", "/admin/stop"))
    assert status == 200
    [(status, *_)] = _ask(_app(keys=(), admin=None), ("GET", "//admin/stop"))
    assert status == 400


def test_keys_may_have_names():
    answers = _ask(
        _app(keys={"ann": KEY, "bob": OTHER}), ("GET", "/v1/chat", ("X-API-Key", OTHER)), ("GET", "/v1/chat")
    )
    assert [status for status, *_ in answers] == [200, 401]
    assert _caller(OTHER).encode() in answers[0][2]


def test_all_keys_are_compared_whichever_fits(monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    counts = []
    for key in (KEY, OTHER, ADMIN, "wrong-key-wrong-key", "x"):
        compared.clear()
        _ask(_app(), ("GET", "/v1/chat", ("X-API-Key", key)))
        counts.append(len(compared))
        assert set(compared) == {(32, 32)}
    assert counts == [3] * 5


def test_refusals_are_worded_by_whom_the_service_says():
    words = []

    def reject(scope, status, message, code):
        words.append((scope["path"], int(status), code))
        return JSONResponse({"dialect": code}, 418)

    app = _app(reject=reject)
    answers = _ask(
        app, ("GET", "/v1/chat"), ("GET", "//"), ("GET", "/admin", BEARER), ("GET", "/a", ("X-API-Key", "b"))
    )
    assert [status for status, *_ in answers] == [418] * 4
    assert answers[0][1]["www-authenticate"] == "Bearer"
    codes = ["missing_api_key", "invalid_path", "admin_key_required", "invalid_api_key"]
    assert words == list(zip(["/v1/chat", "//", "/admin", "/a"], [401, 400, 403, 401], codes, strict=True))


def test_websockets_are_refused():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(_app()({"type": "websocket", "path": "/health", "headers": []}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.fixture
def key_file(tmp_path):
    """key_file(text): a file that only its owner may read."""

    def write(text, mode=0o600):
        path = tmp_path / "keys.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)
        return path

    return write


def test_keys_come_from_options_and_a_file(key_file):
    assert read_api_keys([], None) == ()
    assert read_api_keys([KEY], None) == (KEY,)
    text = f"# for Ann\n{OTHER}\r\n\n  {KEY}  \n#{ADMIN}\n"
    assert read_api_keys([KEY], key_file(text)) == (KEY, OTHER)
    assert read_api_keys([], key_file(OTHER)) == (OTHER,)


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "key",
    [
        "", SECRET, f"{SECRET} with a space", f"{SECRET}中文中文中文中文中文", f"{SECRET}0123456789\n",
        f"{SECRET}\x7f012345678901",
    ],
)  # fmt: skip
def test_a_key_that_could_not_be_sent_or_could_be_guessed_is_refused_and_not_shown(key, key_file):
    with pytest.raises(ParameterError, match="API key number 2 of the options cannot be used") as caught:
        read_api_keys([KEY, key], None)
    assert SECRET not in str(caught.value)
    if key and "\n" not in key:
        with pytest.raises(ParameterError, match=r"line 2 of API key file .*keys\.txt cannot be used") as caught:
            read_api_keys([], key_file(f"{KEY}\n{key}\n"))
        assert SECRET not in str(caught.value)


def test_a_key_file_that_guards_nothing_is_refused(key_file, tmp_path):
    for text in ("", "\n\n", "# only this\n"):
        with pytest.raises(ParameterError, match="holds no key"):
            read_api_keys([KEY], key_file(text))
    with pytest.raises(ParameterError, match=r"open to others \(mode 0644\); chmod 600 .*keys\.txt"):
        read_api_keys([], key_file(KEY, 0o644))
    with pytest.raises(ParameterError, match="cannot be read: No such file"):
        read_api_keys([], tmp_path / "absent")
    with pytest.raises(ParameterError, match="cannot be read: Is a directory"):
        read_api_keys([], tmp_path)
    with pytest.raises(ParameterError, match="more than 1048576 bytes"):
        read_api_keys([], key_file(b"#" * (2**20 + 1)))
    with pytest.raises(ParameterError, match=r"line 1 of .* cannot be used"):
        read_api_keys([], key_file(b"\xff\xfe" + KEY.encode("utf-16-le")))
