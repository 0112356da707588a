"""huggingface_hub's InferenceClient, which posts to the bare URL."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.vectors import PASSAGES, QUERY, QUESTION, assert_same, reference
from tests.e2e.process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def client(demo: ServerProcess) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(model=demo.base_url)


def test_feature_extraction(demo: ServerProcess, client: Any) -> None:
    one = client.feature_extraction(QUESTION)
    assert one.shape == (1, 640)
    assert_same(one, reference(demo, QUESTION))
    assert_same(client.feature_extraction(PASSAGES), reference(demo, PASSAGES))


def test_feature_extraction_with_a_prompt(demo: ServerProcess, client: Any) -> None:
    found = client.feature_extraction(QUESTION, prompt_name="query", normalize=True)
    assert_same(found, reference(demo, QUESTION, instruction=QUERY))


def test_feature_extraction_options(demo: ServerProcess, client: Any) -> None:
    raw = client.feature_extraction(PASSAGES, normalize=False)
    assert_same(raw, reference(demo, PASSAGES, normalize=False))
    assert (np.abs(np.linalg.norm(raw, axis=1) - 1) > 1e-3).all()
    assert_same(client.feature_extraction(PASSAGES, dimensions=64), reference(demo, PASSAGES, dimensions=64))
    cut = client.feature_extraction(PASSAGES, truncate=True, truncation_direction="left")
    assert_same(cut, reference(demo, PASSAGES))


def test_what_it_says_of_an_error(demo: ServerProcess, client: Any) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError) as caught:
        client.feature_extraction("the river " * 9000, truncate=False)
    assert caught.value.response.status_code == 422
    assert caught.value.response.json()["error_type"] == "Validation"
