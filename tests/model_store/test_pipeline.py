"""For which batches the forward pass is captured; tests/service/test_worker_on_cuda.py has the vectors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model_store.encoder.encoder import Encoder
from model_store.encoder.pipeline import Pipeline, graph_sizes
from tests.cuda_stand_in import Gpus, install
from tests.tiny import tiny_model


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


def test_what_waits_for_the_device_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that fails can leave torch's allocator unusable, so none is begun."""
    gpus = install(Gpus(), monkeypatch.setattr)
    manifest: Any = SimpleNamespace(attention="bidirectional", width=64, pooling="mean", max_positions=512)
    pipeline = Pipeline(Encoder.of(tiny_model("llama").bfloat16(), manifest, torch.device("cuda", 0)))
    assert len(pipeline.with_graphs([16, 24]).replays) == gpus.done["capture"] == 2

    def waits(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.sum().item()

    pipeline.encoder.model.norm.register_forward_hook(waits)
    with pytest.raises(RuntimeError, match="synchronizing"):
        pipeline.with_graphs([16])
    assert gpus.done["capture"] == 2
