"""How much a schema, an expression or a list of choices may ask of the compiler of grammars.

It has limits of its own, but no clock: some schemas of a kilobyte keep it busy for minutes, and through a long
chain of $ref it recurses until the stack of its thread is full, which ends the process. What is known to do so is
refused before it comes that far.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from wemm.errors import ClientError, ParameterError
from wemm.server.body import parse_json

_MOST = {
    "regex, characters": 8192,
    "choice, number": 4096,
    "choice, characters": 65536,
    "json, characters": 65536,
    # One call deeper per level, and through every $ref once more.
    "json, levels times references": 600,
    # Each is made disjoint from all the others.
    "json, patternProperties": 16,
    # What must hold at once is multiplied out: branches to the power of conditions.
    "json, conditions beside one another": 4,
    "json, combinations of branches": 256,
}
_BRANCHES = ("anyOf", "oneOf", "allOf")
_NO_CONDITIONS = frozenset(
    ("$ref", *_BRANCHES, "$defs", "definitions", "$id", "$schema", "$comment", "title", "description", "default",
     "examples", "deprecated", "readOnly", "writeOnly", "discriminator")
)  # fmt: skip


def check_grammar_size(wanted: Mapping[str, Any]) -> None:
    """`wanted`: what StructuredOutputsParams is made of. Raises ParameterError."""
    choices = wanted.get("choice", ())
    sizes = {
        "regex, characters": len(wanted.get("regex", "")),
        "choice, number": len(choices),
        "choice, characters": sum(map(len, choices)),
    }
    schema = wanted.get("json")
    if schema is not None:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        sizes["json, characters"] = len(text)
        _check(sizes)
        try:
            sizes |= _sizes(parse_json(text.encode()))
        except ClientError as error:
            raise ParameterError(f"structured_outputs.json: {error}", "structured_outputs") from None
    _check(sizes)


def _check(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size > _MOST[name]:
            message = f"structured_outputs.{name}: {size}; at most {_MOST[name]}"
            raise ParameterError(message, "structured_outputs")


def _sizes(schema: Any) -> dict[str, int]:
    depth, references, num_patterns, num_conditions, num_branches = 0, {""}, 0, 0, 1
    for depth, part in _parts(schema):  # noqa: B007 - the last is the deepest
        references |= {str(part["$ref"])} if "$ref" in part else set()
        num_patterns += _length(part.get("patternProperties"))
        num_conditions += _num_conditions(part)
        num_branches = max(num_branches, _length(part.get("anyOf")), _length(part.get("oneOf")))
    return {
        "json, levels times references": depth * len(references),
        "json, patternProperties": num_patterns,
        "json, conditions beside one another": num_conditions,
        "json, combinations of branches": num_branches ** (num_conditions + 1) if num_conditions else 1,
    }


def _num_conditions(part: Mapping[str, Any]) -> int:
    """How many more than one hold at once."""
    combined = [name for name in ("$ref", "anyOf", "oneOf") if name in part]
    if not combined and "allOf" not in part:
        return 0
    has_own = any(name not in _NO_CONDITIONS for name in part)
    return max(0, len(combined) + _length(part.get("allOf")) + has_own - 1)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (dict, list)) else 0


def _parts(schema: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Every object, and how deep it lies, level by level."""
    depth, level = 0, [schema]
    while level:
        depth += 1
        objects = [value for value in level if isinstance(value, dict)]
        yield from ((depth, value) for value in objects)
        lists = [value for value in level if isinstance(value, list)]
        level = [child for value in (*lists, *(value.values() for value in objects)) for child in value]
