"""The service's own description of itself: valid, and true whatever is sent."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]


@pytest.fixture(scope="module")
def schema(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_the_document_is_valid_openapi(client):
    document = client.get("/openapi.json").json()
    validate(document, cls=OpenAPIV31SpecValidator)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/generate", "/metrics"} <= set(
        document["paths"]
    )
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path


def _fuzz(schema, max_examples):
    """So many generated requests to every route: no 5xx, nothing that the document does not promise."""
    fuzzing = settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def call(case):
        case.call_and_validate(checks=CHECKS, timeout=60)

    for operation in schema.get_all_operations():
        fuzzing(given(operation.ok().as_strategy())(call))()


def test_no_generated_request_breaks_it(schema):
    _fuzz(schema, 10)


@pytest.mark.slow
def test_no_generated_request_breaks_it_in_many_tries(schema):
    _fuzz(schema, 150)
