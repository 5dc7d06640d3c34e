"""S17: schemas and expressions that are hard to follow, while somebody else asks too."""

from __future__ import annotations

import json
import string
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.server.security.conftest import Neighbour, chat, wait_until

pytestmark = pytest.mark.security("S17")

ASKED = [{"role": "user", "content": "?"}]
SECONDS = 5


def properties(count, schema, name="property_%05d"):
    return {"type": "object", "properties": {name % i: schema for i in range(count)}}


def chain(count, link):
    """`count` definitions, each a link to the next and the last to the first."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{(i + 1) % count}"}) for i in range(count)}
    return {"$defs": links, "$ref": "#/$defs/d0"}


def nested(depth, schema):
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMAS = {
    "itself": {"$ref": "#"},
    "itself in a property": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "each other": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "all of itself": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "any of itself": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}, {"type": "string"}]},
    "10^4 values": {"enum": [f"v{i}" for i in range(10**4)]},
    "10^5 values": {"enum": [f"v{i}" for i in range(10**5)]},
    "1 MB of properties": properties(25_000, {"type": "string"}),
    "1 MB of description": {"type": "string", "description": "x" * 2**20},
    "1 MB in a value": {"const": "x" * 2**20},
    "60 KB of properties": properties(1500, {"type": "string"}),
    "1000 patterns": properties(1000, {"type": "string", "pattern": "^(a|b)*$"}),
    "nested quantifiers": {"type": "string", "pattern": "^(a+)+$"},
    "quantifiers of quantifiers": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
    "look behind": {"type": "string", "pattern": "(?<=a)b"},
    "lengths": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "items": {"type": "array", "items": {"type": "string"}, "minItems": 10**6},
    "tiny multiples": {"type": "number", "multipleOf": 1e-300, "minimum": 1e-300},
    "deep": nested(26, {}),
    "chain of $ref": chain(100, lambda next: {"type": "object", "properties": {"a": next}}),
    "chain of 1000 $ref": chain(1000, lambda next: {"type": "object", "properties": {"a": next}}),
    "chain of deep $ref": chain(100, lambda next: nested(20, next)),
    "doubling $ref": chain(40, lambda next: {"type": "object", "properties": {"a": next, "b": next}}),
    "no schema": {"type": "nonsense", "properties": 7},
    "unknown format": {"type": "string", "format": "../../etc/passwd"},
    "false": {"not": {}},
    "http": {"$ref": "http://127.0.0.1:1/schema.json"},
    "https": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
    "file": {"$ref": "file:///etc/passwd"},
    "id": {"$id": "http://127.0.0.1:1/schema.json", "$ref": "other.json"},
    "dialect": {"$schema": "http://127.0.0.1:1/dialect", "type": "string"},
}
OTHERS = {
    "regex, nested quantifiers": {"guided_regex": "^(a+)+$"},
    "regex, quantifiers of quantifiers": {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"},
    "regex, exponential automaton": {"guided_regex": "(a|b)*a(a|b){40}"},
    "regex, 1 MB": {"guided_regex": "a" * 2**20},
    "regex, deep": {"guided_regex": "(" * 10**4 + ")" * 10**4},
    "regex, open": {"guided_regex": "((("},
    "regex, reference": {"guided_regex": r"(a)\1"},
    "regex, classes": {"guided_regex": r"[\u0000-\U0010ffff]{1,4000}"},
    "choice, 10^4": {"guided_choice": [f"c{i}" for i in range(10**4)]},
    "choice, 10^5": {"guided_choice": [f"c{i}" for i in range(10**5)]},
    "choice, 1 MB": {"guided_choice": ["c" * 2**20]},
    "choice, of a grammar": {"guided_choice": ['"\nstart: /.*/', "%import common", "\\", "\0", ""]},
    "text, no JSON": {"guided_json": "{"},
    "text, deep": {"guided_json": "[" * 10**5},
    "text, deep and closed": {"guided_json": '{"items":' * 10**5 + "{}" + "}" * 10**5},
    "two at once": {"guided_json": {"type": "object"}, "guided_regex": "a"},
}


def ended_in_time(client, **more):
    started = time.monotonic()
    answered = chat(client, ASKED, max_tokens=24, **more)
    assert time.monotonic() - started < SECONDS
    assert answered.status_code in (200, 400), answered.text
    if answered.status_code == 400:
        error = answered.json()["error"]
        assert error["param"] == "structured_outputs" or "JSON body" in error["message"]
        assert len(error["message"]) < 2000


def asking_for(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def test_a_schema_is_followed_or_refused_in_time(alice, network, neighbour, each):
    network.news()
    for name in each(SCHEMAS):
        ended_in_time(alice, **asking_for(SCHEMAS[name]))
        ended_in_time(alice, guided_json=json.dumps(SCHEMAS[name]))
    assert network.news() == []


def test_so_is_whatever_else_says_what_an_answer_must_be(alice, neighbour, each):
    for name in each(OTHERS):
        ended_in_time(alice, **OTHERS[name])


def test_what_is_followed_is_followed(alice):
    """No limit of the above is in the way of a schema of real life."""
    address = properties(30, {"type": "string", "maxLength": 3}, "line_%d")
    schema = {
        "$defs": {f"address_{i}": address for i in range(40)},
        **properties(40, None, "place_%d"),
        "additionalProperties": False,
    }
    schema["properties"] = {f"place_{i}": {"$ref": f"#/$defs/address_{i}"} for i in range(40)}
    answered = chat(alice, ASKED, max_tokens=24, **asking_for(schema))
    assert answered.status_code == 200
    assert answered.json()["choices"][0]["message"]["content"].startswith("{")
    assert chat(alice, ASKED, guided_choice=[f"v{i}" for i in range(1000)]).status_code == 200


COSTLY = {
    "all of 32 patterns": {
        "type": "string",
        "allOf": [{"pattern": f"(.*{string.ascii_lowercase[i % 26]}){{3}}.{{{i}}}"} for i in range(32)],
    },
    "1000 patterns of properties": {
        "type": "object",
        "patternProperties": {f"^a{i}(b|c)*$": {"type": "string"} for i in range(1000)},
    },
    "all of any of 14": {
        "allOf": [
            {"anyOf": [properties(1, {"type": "integer"}, f"k{i}_{j}_%d") for j in range(14)]} for i in range(3)
        ]
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_small_schema_of_great_cost_holds_nobody_up(serve, name):
    """As many of them at once as requests are prepared at once, on a service that may be lost."""
    service = serve("--no-warm-up").wait_until_ready()
    with service.client() as client, ThreadPoolExecutor(4) as pool:
        client.timeout = SECONDS
        with Neighbour(service) as neighbour:
            wait_until(lambda: bool(neighbour.seconds))
            costly = [pool.submit(chat, client, ASKED, **asking_for(COSTLY[name])) for _ in range(4)]
            time.sleep(SECONDS)
            answered = [future.result().status_code for future in costly]
        assert set(answered) <= {200, 400}
        assert max(neighbour.seconds) < 3
