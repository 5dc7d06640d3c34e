"""S24: a web page of a stranger, open in a browser that reaches the service, neither asks nor reads anything."""

from __future__ import annotations

import json

import pytest

from tests.server.conftest import conversation
from tests.server.security.conftest import ADMIN, ALICE, chat

pytestmark = pytest.mark.security("S24")

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "?"}], "max_tokens": 2})
ROUTES = [
    ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/infer"), ("POST", "/generate"), ("POST", "/tokenize"),
    ("POST", "/v2/models/nano/generate"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/health"),
    ("GET", "/openapi.json"), ("GET", "/nothing"),
]  # fmt: skip
PAGES = {
    "another site": {"Origin": "http://evil.example"},
    "another port": {"Origin": "http://127.0.0.1:3000"},
    "another scheme": {"Origin": "https://127.0.0.1"},
    "sandboxed": {"Origin": "null"},
    "a file": {"Origin": "file://"},
    "an extension": {"Origin": "chrome-extension://abc"},
    "no origin": {"Origin": ""},
    "says cross-site": {"Sec-Fetch-Site": "cross-site"},
    "cross-site image": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    "cross-site frame": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
}
SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a")
"""Types of bodies that a page may send without asking first."""
HARMLESS = {"application/json", "text/event-stream", "text/plain"}
SCRIPT = "<script>alert(1)</script>"


def assert_refused(answered, status):
    assert answered.status_code == status, answered.text
    assert_for_no_page(answered)


def assert_for_no_page(answered):
    """It is neither readable for a page of another origin nor a page itself."""
    assert not [name for name in answered.headers if name.lower().startswith("access-control-")]
    assert "set-cookie" not in answered.headers
    if answered.content:
        assert answered.headers["content-type"].partition(";")[0] in HARMLESS
    if answered.status_code >= 400:
        assert isinstance(answered.json(), dict)


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_others_are_refused_on_every_route(alice, page):
    for method, path in ROUTES:
        body = {"content": BODY, "headers": {"Content-Type": "application/json", **PAGES[page]}}
        assert_refused(
            alice.request(method, path, **(body if method == "POST" else {"headers": PAGES[page]})), 403
        )


@pytest.mark.parametrize("content_type", SIMPLE)
def test_simple_requests_of_pages_are_refused(alice, content_type):
    for page in PAGES.values():
        headers = {"Content-Type": content_type, **page}
        assert_refused(alice.post(CHAT, content=BODY, headers=headers), 403)


def test_forms_that_are_sent_from_elsewhere_are_refused(alice):
    navigation = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert_refused(alice.post(CHAT, content=BODY, headers={**navigation, "Content-Type": "text/plain"}), 403)


def test_a_refused_page_has_asked_nothing(alice, admin):
    def num_tokens():
        lines = admin.get("/metrics").text.splitlines()
        return [line for line in lines if line.startswith("wemm_tokens_total")]

    before = num_tokens()
    for page in PAGES.values():
        chat(alice, [{"role": "user", "content": "?"}])  # the client's own is counted
        counted = num_tokens()
        assert counted != before
        alice.post(CHAT, content=BODY, headers=page)
        before = num_tokens()
        assert before == counted


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:3000"])
def test_preflights_allow_nothing(guarded, origin):
    with guarded.client(verify=False) as client:
        for _, path in ROUTES:
            for method in ("POST", "GET", "DELETE", "PUT"):
                asked = {
                    "Access-Control-Request-Method": method,
                    "Access-Control-Request-Headers": "authorization",
                }
                private = {"Access-Control-Request-Private-Network": "true"}
                answered = client.options(path, headers={"Origin": origin, **asked, **private})
                assert_refused(answered, 403)


def test_the_own_origin_needs_no_permission(guarded, alice):
    answered = alice.post(CHAT, content=BODY, headers={"Origin": guarded.url, "Content-Type": "application/json"})
    assert answered.status_code == 200
    assert_for_no_page(answered)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "public.example",
        "169.254.169.254",
        "10.0.0.1",
        "0.0.0.0",
        "127.1",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
    ],
)
def test_names_that_lead_here_are_not_ours(guarded, alice, host):
    """After rebinding a page is of one origin with the service."""
    port = guarded.url.rpartition(":")[2]
    for name in (host, f"{host}:{port}"):
        for more in ({}, {"Origin": f"http://{name}"}, {"Sec-Fetch-Site": "same-origin"}):
            for method, path in ROUTES:
                assert_refused(alice.request(method, path, headers={"Host": name, **more}), 421)
        # Other headers that name hosts are no better.
        forwarded = {"X-Forwarded-Host": "localhost", "Forwarded": "host=localhost"}
        assert_refused(alice.get("/v1/models", headers={"Host": name, **forwarded}), 421)


def test_no_answer_is_a_web_page(alice, bob, admin):
    answers = [
        alice.get("/"),
        alice.get("/docs"),
        alice.get("/redoc"),
        alice.get(f"/{SCRIPT}"),
        alice.get(f"/v1/models/{SCRIPT}"),
        alice.get("/v2/models/" + SCRIPT.replace("/", "")),
        alice.get("/openapi.json"),
        alice.get("/v1/models"),
        alice.get(CHAT),
        alice.put(CHAT),
        admin.get("/metrics"),
        chat(alice, [{"role": "user", "content": SCRIPT}], model=SCRIPT),
        chat(alice, [{"role": SCRIPT, "content": SCRIPT}]),
        chat(alice, [{"role": "user", "content": "?"}], max_tokens=SCRIPT),
        chat(alice, [{"role": "user", "content": "?"}], **{SCRIPT: SCRIPT}),
        chat(alice, [{"role": "user", "content": [{"type": SCRIPT}]}]),
        chat(alice, [{"role": "user", "content": f"Say {SCRIPT}"}]),
        chat(alice, conversation("word.png"), stream=True),
        alice.post(CHAT, content=SCRIPT),
        alice.post("/tokenize", json={"prompt": SCRIPT}),
        *[
            alice.post(path, json={"inputs": SCRIPT, "stream": stream, "parameters": {"max_new_tokens": 4}})
            for path in ("/", "/infer", "/generate", "/generate_stream")
            for stream in (False, True)
        ],
    ]
    for answered in answers:
        assert_for_no_page(answered)
    echoed = [answered for answered in answers if SCRIPT in answered.text]
    assert echoed
    for answered in echoed:
        assert answered.headers["content-type"].partition(";")[0] in ("application/json", "text/event-stream")


def test_models_cannot_make_pages(alice):
    schema = {"type": "string", "const": SCRIPT}
    for stream in (False, True):
        answered = chat(
            alice,
            [{"role": "user", "content": "?"}],
            stream=stream,
            max_tokens=64,
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        )
        assert answered.status_code == 200, answered.text
        assert_for_no_page(answered)


@pytest.mark.parametrize("key", [None, ALICE, ADMIN])
def test_links_that_are_followed_ask_for_the_key_like_all_else(guarded, key):
    navigation = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with guarded.client(verify=False, headers={"X-API-Key": key} if key else {}) as client:
        answered = client.get("/v1/models", headers=navigation)
        assert answered.status_code == (200 if key else 401)
        assert_for_no_page(answered)


@pytest.mark.slow
def test_no_page_stops_the_service(serve):
    """The route that does is a GET, as MindIE has it: a link or an image would be enough."""
    service = serve("--no-warm-up", "--management-port", "0").wait_until_ready()
    navigation = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    image = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    with service.client() as client:
        stop = f"{service.urls[1]}/stopService"
        for site in ("cross-site", "same-site"):
            for kind in (navigation, image):
                assert_refused(client.get(stop, headers={"Sec-Fetch-Site": site, **kind}), 403)
        assert_refused(client.get(stop, headers={"Origin": "http://evil.example"}), 403)
        assert_refused(client.get(stop, headers={"Host": "evil.example"}), 421)
        assert client.get("/ready").status_code == 200
        assert client.get(stop).status_code == 200
    assert service.process.wait(60) == 0
