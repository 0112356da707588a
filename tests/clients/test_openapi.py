"""The served OpenAPI document, taken at its word: requests made from it get answers that it describes.

FUZZ_EXAMPLES is how many cases each operation that takes a body is tried with.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.e2e.process import ServerProcess

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
pytestmark = pytest.mark.timeout(60 + 6 * EXAMPLES)


def check_operation(operation: Any, examples: int) -> None:
    """Make requests from one operation's schema.

    Raises:
        Exception: one that says which request got what answer, and what is wrong with it.
    """
    import hypothesis
    from schemathesis import checks

    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=EXAMPLES == 40,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    described = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]

    def answer_is_described(case: Any) -> None:
        answer = case.call()
        if answer.status_code == 504:
            assert answer.json()["error"]["code"] == "timeout", "only a deadline of the request's own is no failure"
        else:
            case.validate_response(answer, checks=[checks.not_a_server_error, *described])

    settings(hypothesis.given(case=operation.as_strategy())(answer_is_described))()


def test_every_answer_is_one_that_the_document_describes(tiny: ServerProcess) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="the client packages are in the extra `clients`")
    failures = []
    tried = []
    for found in schemathesis.openapi.from_url(f"{tiny.base_url}/openapi.json").get_all_operations():
        operation = found.ok()
        tried.append(operation.label)
        try:
            check_operation(operation, examples=EXAMPLES if operation.method == "post" else 5)
        except BaseException as error:  # groups of failures are no Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            failures.append(f"== {operation.label}\n{'; '.join(map(str, getattr(error, 'exceptions', [error])))}")
    assert "POST /v1/embeddings" in tried
    assert not failures, "\n".join(failures)
