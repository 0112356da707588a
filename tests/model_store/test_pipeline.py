"""For which batches the forward pass is captured; tests/service/test_worker_on_cuda.py has the vectors."""

from __future__ import annotations

import pytest

from model_store.pipeline import graph_sizes


@pytest.mark.parametrize("most", [16, 100, 512, 4096])
def test_little_is_computed_for_nothing(most: int) -> None:
    """Above the crossover tokens cost time: about 216 in bfloat16 on an H100, more where memory is slower."""
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 16
    assert sizes[-1] <= most
    for tokens in range(1, 4097):
        computed = next((size for size in sizes if size >= tokens), tokens)
        if tokens > 100:
            assert computed <= 1.10 * tokens
        else:
            assert computed - tokens < 16


def test_there_are_not_too_many() -> None:
    assert len(graph_sizes(512)) == 47
    assert len(graph_sizes(4096)) == 95
