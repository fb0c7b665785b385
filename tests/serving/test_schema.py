"""Requests made from /openapi.json, fitting and not: nothing is a 5xx, and every answer is what the schema says."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.connections import limited_protocol
from jaxspec.serving.http.settings import HttpSettings
from tests.serving.listening import Listening

KEY = "sk-of-the-tests"
OPERATIONS = (
    ("POST", "/v1/chat/completions", 60),
    ("GET", "/v1/models", 10),
    ("GET", "/v1/models/{name}", 20),
    ("GET", "/health", 10),
    ("GET", "/ready", 10),
    ("GET", "/metrics", 10),
)
CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.response_headers_conformance,
]


@pytest.fixture(scope="module")
def app(engine):
    return make_app(engine, HttpSettings(served_model_name="demo", api_key=KEY))


@pytest.fixture(scope="module")
def url(app) -> Iterator[str]:
    with Listening(app, http=limited_protocol(10.0)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def schema(app):
    return schemathesis.openapi.from_dict(app.openapi())


def answered_soon(body: Any) -> Any:
    """A body with the name of the model that is there, and a short answer: what else it says stays."""
    if not isinstance(body, dict):
        return body
    changed = {"model": "demo", "max_completion_tokens": 3}
    if isinstance(body.get("n"), int):
        changed["n"] = min(body["n"], 2)
    return {name: value for name, value in body.items() if name not in ("max_tokens", "min_tokens")} | changed


def test_every_operation_is_tested(schema):
    found = {(each.ok().method.upper(), each.ok().path) for each in schema.get_all_operations()}
    assert found == {(method, path) for method, path, _ in OPERATIONS}


@pytest.mark.parametrize(
    ("method", "path", "examples", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if operation[1] != "/health" or mode is GenerationMode.POSITIVE  # there is nothing to get wrong
    ],
)
def test_answers_conform_to_the_schema_whatever_is_asked(schema, url, method, path, examples, mode):
    statuses: dict[int, int] = {}

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def ask(case) -> None:
        if mode is GenerationMode.POSITIVE and method == "POST":
            case.body = answered_soon(case.body)
        response = case.call(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=CHECKS)

    ask()
    if mode is GenerationMode.POSITIVE and path != "/v1/models/{name}":
        assert statuses.get(200), statuses
    assert not any(status >= 500 for status in statuses)
