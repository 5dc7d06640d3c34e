"""S20 and S21: what is closed without a key, and what callers with different keys see of each other."""

from __future__ import annotations

import itertools
import json
import time

import httpx
import pytest

from tests.server.security.conftest import ADMIN, ALICE, BOB, Wire, chat, figure
from tests.server.security.test_hostile_images import SHAPES, WORD, encode, url_of

OPEN = {"/health", "/ready"}
WRONG = [
    "wrong",
    ALICE[:-1],
    ALICE + "x",
    ALICE.upper(),
    ALICE[:-1] + "\x7f",
    f"{ALICE} {ALICE}",
    f"{ALICE},{BOB}",
    "é" * 16,
    "*",
    "null",
    "a" * 10_000,
]


@pytest.fixture(scope="module")
def planes(guarded):
    """Where the business and the management plane are."""
    return dict(zip(("business", "management"), guarded.urls, strict=True))


@pytest.fixture
def nobody():
    """A client without a key."""
    with httpx.Client(timeout=30, trust_env=False, verify=False) as client:
        yield client


def routes(url, key):
    """(method, path) of everything that the OpenAPI document names, path parameters filled in."""
    document = httpx.get(f"{url}/openapi.json", headers={"X-API-Key": key}, trust_env=False, verify=False).json()
    found = [(method.upper(), path) for path, item in document["paths"].items() for method in item]
    return [(method, path.replace("{model}", "nano").replace("{seconds}", "10")) for method, path in found]


def headers_of(key):
    return [
        [(b"Authorization", f"Bearer {key}".encode())],
        [(b"X-API-Key", key.encode())],
    ]


# --- S20 ---------------------------------------------------------------------------------------------


@pytest.mark.security("S20")
@pytest.mark.parametrize("plane", ["business", "management"])
def test_every_route_but_health_is_closed(planes, nobody, plane):
    found = routes(planes[plane], ADMIN)
    assert len(found) > 15
    for method, path in [
        *found,
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/"),
        ("GET", "/no/such/route"),
    ]:
        for headers in ({}, {"X-API-Key": "wrong-0123456789"}, {"Authorization": "Bearer wrong-0123456789"}):
            answered = nobody.request(method, f"{planes[plane]}{path}", headers=headers)
            if path in OPEN:
                assert answered.status_code == 200
                continue
            assert answered.status_code == 401, (method, path)
            assert answered.headers["www-authenticate"] == "Bearer"
            assert len(answered.text) < 300


@pytest.mark.security("S20")
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "NONSENSE"])
def test_no_method_is_open(planes, nobody, method):
    for plane, path in [("business", "/v1/models"), ("business", "/metrics"), ("management", "/stopService")]:
        assert nobody.request(method, f"{planes[plane]}{path}").status_code in (400, 401, 405, 501)
    expected = {"GET": (200,), "HEAD": (200, 405)}.get(method, (401,))
    for path in OPEN:
        assert nobody.request(method, f"{planes['business']}{path}").status_code in expected


@pytest.mark.security("S20")
def test_a_wrong_key_is_as_good_as_any_other_wrong_key(planes, nobody, each):
    usual = nobody.get(f"{planes['business']}/v1/models", headers={"X-API-Key": "wrong-0123456789"})
    for key in each(WRONG):
        for headers in headers_of(key):
            answered = nobody.get(f"{planes['business']}/v1/models", headers=headers)
            # One that is no header at all ends earlier.
            assert answered.status_code in (400, 401)
            if answered.status_code == 401:
                assert answered.text == usual.text


ELSEWHERE = [
    {"Authorization": ALICE},
    {"Authorization": f"Basic {ALICE}"},
    {"Authorization": "Bearer"},
    {"Authorization": ""},
    {"X-API-Key": ""},
    {"Authorization": f"Bearer{ALICE}"},
    {"Authorization": f"Bearer {ALICE}", "X-API-Key": BOB},
    {"Authorization": f"Bearer {ALICE}", "X-API-Key": "wrong"},
    {"Proxy-Authorization": f"Bearer {ALICE}"},
    {"Api-Key": ALICE},
    {"X_API_Key": ALICE},
    {"Cookie": f"X-API-Key={ALICE}; Authorization=Bearer {ALICE}"},
]


@pytest.mark.security("S20")
def test_a_key_stands_in_one_place(planes, nobody, each):
    for headers in each(ELSEWHERE):
        assert nobody.get(f"{planes['business']}/v1/models", headers=headers).status_code == 401


@pytest.mark.security("S20")
def test_nor_in_the_query_or_the_body(planes, nobody, each):
    for name in each(["api_key", "api-key", "key", "x-api-key", "token", "access_token", "authorization"]):
        assert nobody.get(f"{planes['business']}/v1/models", params={name: ALICE}).status_code == 401
        body = {"messages": [{"role": "user", "content": "?"}], name: ALICE}
        assert nobody.post(f"{planes['business']}/v1/chat/completions", json=body).status_code == 401


SPELLINGS = [
    "//v1/models",
    "/v1//models",
    "/V1/models",
    "/v1/Models",
    "/v1/models/",
    "/./v1/models",
    "/health/../v1/models",
    "/health/..%2fv1/models",
    "/health%2f..%2fv1%2fmodels",
    "/health;/v1/models",
    "/health%00/v1/models",
    "/health\\..\\v1\\models",
    "/%76%31/models",
    "/v1%2fmodels",
    "/health?/v1/models",
    "/health#/v1/models",
    "/health/",
    "/health%0a",
    "/health%20",
    "/HEALTH",
    "http://localhost/v1/models",
    "http://localhost/health/../metrics",
    "*",
    "/metrics",
    "//metrics",
    "/metrics/",
    "/metrics%2f",
    "/%6detrics",
]


@pytest.mark.security("S20")
def test_no_spelling_of_a_path_is_open(guarded, each):
    """Without a key nothing is learnt; what the path is taken for is not said either."""
    for path, method in each(itertools.product(SPELLINGS, ("GET", "POST"))):
        with Wire(guarded.url) as wire:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            wire.send(head.encode())
            status, _, rest = wire.rest(10).partition(b"\r\n")
        if status.split()[1] == b"200":
            assert rest.endswith(b'{"status":"ok"}')
            assert path.partition("?")[0] == "/health"
        else:
            assert status.split()[1] in (b"400", b"401")


@pytest.mark.security("S20")
def test_no_spelling_gives_a_user_the_admins_paths(guarded, each):
    closing = f"Host: localhost\r\nX-API-Key: {ALICE}\r\nConnection: close\r\n\r\n"
    paths = ("//metrics", "/metrics/", "/Metrics", "/metrics%2f", "/./metrics", "/v1/../metrics", "/metrics;")
    for path in each(paths):
        with Wire(guarded.url) as wire:
            wire.send(f"GET {path} HTTP/1.1\r\n{closing}".encode())
            answer = wire.rest(10)
        assert b"wemm_" not in answer
        assert answer.split()[1][:1] in (b"3", b"4")


@pytest.mark.security("S20")
def test_a_users_key_opens_nothing_of_the_admins(planes, nobody):
    for plane, paths in (
        ("business", ["/metrics"]),
        ("management", [path for _, path in routes(planes["management"], ADMIN)]),
    ):
        for path in paths:
            answered = nobody.get(f"{planes[plane]}{path}", headers={"X-API-Key": ALICE})
            if path in OPEN:
                continue
            assert answered.status_code == 403, path
            assert answered.json().get("error")
    assert nobody.get(f"{planes['business']}/metrics", headers={"X-API-Key": ADMIN}).status_code == 200
    assert nobody.get(f"{planes['management']}/v1/config", headers={"X-API-Key": ADMIN}).status_code == 200
    assert nobody.get(f"{planes['business']}/v1/models", headers={"X-API-Key": ADMIN}).status_code == 200


@pytest.mark.security("S20")
def test_nothing_is_read_or_computed_before_the_key_is_known(guarded, admin):
    """A stranger's eight megabytes cost a header."""
    before = figure(admin, "wemm_fetch_seconds_count")
    with Wire(guarded.url) as wire:
        wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n{")
        assert wire.receive(seconds=2).startswith(b"HTTP/1.1 401 ")
    assert figure(admin, "wemm_fetch_seconds_count") == before


@pytest.mark.security("S20")
def test_the_time_of_a_refusal_tells_nothing(planes, nobody):
    """Of keys that share nothing, all but the last character, or everything with one of the known."""
    keys = ["zzzzzzzzzzzzzzzz", ALICE[:-1] + "z", BOB[:-1] + "z", "z" + ALICE[1:]]
    fastest = dict.fromkeys(keys, float("inf"))
    for _ in range(60):
        for key in keys:
            started = time.perf_counter()
            nobody.get(f"{planes['business']}/v1/models", headers={"X-API-Key": key})
            fastest[key] = min(fastest[key], time.perf_counter() - started)
    assert max(fastest.values()) < 2 * min(fastest.values())


# --- S21 ---------------------------------------------------------------------------------------------


@pytest.fixture
def fresh():
    """The URL of an image that nobody has sent before."""
    image = SHAPES.copy()
    image.putpixel((0, 0), tuple(time.time_ns() >> shift & 0xFF for shift in (0, 8, 16)))
    image.putpixel((1, 0), tuple(time.time_ns() >> shift & 0xFF for shift in (24, 32, 40)))
    return url_of(encode(image))


def about_star(client, url, **more):
    content = [
        {"type": "image_url", "image_url": {"url": url}, **more},
        {"type": "text", "text": "What colour is the star?"},
    ]
    answered = chat(client, [{"role": "user", "content": content}]).json()
    assert answered["choices"][0]["message"]["content"] == "blue"
    return answered["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.security("S21")
def test_what_one_caller_sent_is_cached_for_that_caller_alone(alice, bob, admin, fresh):
    def misses():
        return figure(admin, "wemm_image_cache_misses_total")

    start = misses()
    assert about_star(alice, fresh) == 0
    assert misses() == start + 1
    assert about_star(alice, fresh) > 0
    assert misses() == start + 1
    assert about_star(bob, fresh) == 0
    assert misses() == start + 2
    assert about_star(bob, fresh) > 0
    assert about_star(alice, fresh) > 0
    assert misses() == start + 2


@pytest.mark.security("S21")
def test_so_it_is_for_text_on_every_route(alice, bob):
    text = f"{time.time_ns()} is a prompt that nobody has asked before, and long enough for some blocks of cache."

    def completed(client):
        answered = client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
        return answered.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [completed(alice), completed(bob)] == [0, 0]
    assert completed(alice) > 0
    assert completed(bob) > 0

    def chatted(client):
        answered = chat(client, [{"role": "system", "content": text}, {"role": "user", "content": text[::-1]}])
        return answered.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert chatted(alice) == 0
    assert chatted(alice) > 0
    assert chatted(bob) == 0
    # What another dialect sent for the same caller counts.
    assert (
        bob.post("/generate", json={"inputs": f"{text}!", "parameters": {"max_new_tokens": 1}}).status_code == 200
    )
    assert completed(alice) > 0


@pytest.mark.security("S21")
def test_a_key_in_another_header_is_the_same_caller(guarded, fresh):
    with guarded.client(headers={"X-API-Key": ALICE}, verify=False) as other:
        assert about_star(other, fresh) == 0
    with guarded.client(headers={"Authorization": f"bearer  {ALICE}"}, verify=False) as other:
        assert about_star(other, fresh) > 0


@pytest.mark.security("S21")
@pytest.mark.parametrize("field", ["uuid", "id", "image_id", "cache_salt", "hash"])
def test_no_caller_names_an_image_or_a_cache(alice, bob, fresh, field):
    """An id of one's own choice could be somebody else's."""
    assert about_star(alice, fresh, **{field: "same"}) == 0
    other = url_of(encode(WORD))
    content = [
        {"type": "image_url", "image_url": {"url": other, field: "same"}, field: "same"},
        {"type": "text", "text": "What word is written here?"},
    ]
    for client in (alice, bob):
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, field: "same"}
        answered = client.post("/v1/chat/completions", json=body).json()
        assert answered["choices"][0]["message"]["content"] == "WEMM"
    for body in ({"cache_salt": "", "messages": json.loads("[]")}, {"cache_salt": ALICE, "messages": []}):
        assert bob.post("/v1/chat/completions", json=body).status_code == 400
    assert about_star(bob, fresh, **{field: "same"}) == 0


@pytest.mark.security("S21")
def test_nobody_stops_what_another_asked(guarded, alice, bob, admin):
    """By the id that MindIE's callers give."""
    body = json.dumps(
        {"inputs": "?", "id": "known", "parameters": {"max_new_tokens": 900, "temperature": 100.0, "seed": 2}}
    )
    head = f"POST /infer HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {ALICE}\r\nContent-Length: {len(body)}\r\n\r\n"
    with Wire(guarded.url) as wire:
        wire.send((head + body).encode())
        while not figure(admin, "wemm_requests_running"):
            time.sleep(0.01)
        assert bob.post("/v2/models/nano/stopInfer", json={"id": "known"}).status_code == 404
        assert figure(admin, "wemm_requests_running") == 1
        assert alice.post("/v2/models/nano/stopInfer", json={"id": "known"}).status_code == 200
        assert wire.receive(seconds=10).startswith(b"HTTP/1.1 200 ")
