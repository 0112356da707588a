from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from service.batching.cost_model import CostModel
from service.batching.limits import Limits
from service.batching.scheduling import BatchLimits
from service.errors import StartupError
from service.server.process import listen
from service.settings import Settings, load_settings, settings_table
from tests.service.fakes import fake_manifest


def limits(positions: int = 32768, device: str = "cpu", **given: Any) -> Limits:
    return Limits(Settings(**given), fake_manifest(positions), device)


def test_explicit_values_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_PORT", "9000")
    assert load_settings({}).port == 9000
    assert load_settings({"port": "9001"}).port == 9001
    monkeypatch.setenv("LLM2VEC_PORT", "")
    assert load_settings({}).port == 8000


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LLM2VEC_TOKEN_BUGDET", "1", "did you mean LLM2VEC_TOKEN_BUDGET"),
        ("LLM2VEC_XYZZY", "1", "known are LLM2VEC_"),
        ("LLM2VEC_PORT", "many", "^LLM2VEC_PORT is 'many': it must be a whole number$"),
        ("LLM2VEC_BATCH_SECONDS", "long", "it must be a number$"),
        ("LLM2VEC_ANY_MODEL", "maybe", "it must be true or false$"),
        ("LLM2VEC_DTYPE", "int4", "^LLM2VEC_DTYPE is 'int4': it must be 'auto', 'bfloat16', 'float16' or 'float32'$"),
        ("LLM2VEC_CORS_ORIGINS", "x", "^LLM2VEC_CORS_ORIGINS is 'x': 'x' is no origin"),
        (
            "LLM2VEC_MODEL_ALIASES",
            "a",
            'it is not valid JSON: Expecting value at column 1; write {"text-.*}, for example$',
        ),
        ("LLM2VEC_MODEL_ALIASES", "[1]", 'it is not a JSON object; write {"text-embedding-3-small": ""'),
        ("LLM2VEC_MODEL_ALIASES", '{"a": 1}', "'a' stands for 1, not for a string; write {"),
        ("LLM2VEC_MODEL_ALIASES", '{"\\ud800": ""}', "half of a surrogate pair"),
        ("LLM2VEC_FRONTENDS", "0", "greater than or equal to 1"),
        ("LLM2VEC_TOKENIZER_THREADS", "0", "greater than or equal to 1"),
    ],
)
def test_a_wrong_variable_refuses_to_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StartupError, match=message):
        load_settings({})


def test_aliases_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM2VEC_MODEL_ALIASES", '{"queries": "query"}')
    assert load_settings({}).model_aliases == {"queries": "query"}


def test_limits_by_default() -> None:
    cpu, cuda, short = limits(), limits(device="cuda"), limits(positions=512)
    assert (cpu.max_input_tokens, cpu.token_budget) == (8192, 8192)
    assert (cuda.max_input_tokens, cuda.token_budget) == (8192, 16384)
    assert short.max_input_tokens == 512
    assert limits(max_input_tokens=20000).token_budget == 20000


@pytest.mark.parametrize(
    ("given", "several"),
    [
        ({}, False),
        ({"device": "cuda:1"}, False),
        ({"frontends": 2}, True),
        ({"device": "cpu,cpu"}, True),
        ({"device": "cuda:all"}, True),
    ],
)
def test_one_process_unless_more_are_asked_for(given: dict[str, Any], several: bool) -> None:
    assert Settings(**given).several_processes is several


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"token_budget": 4096},
            "the model reads 8192 tokens but token_budget is 4096: raise LLM2VEC_TOKEN_BUDGET to at least 8192 or "
            "lower LLM2VEC_MAX_INPUT_TOKENS",
        ),
        ({"max_input_tokens": 40000}, "lower LLM2VEC_MAX_INPUT_TOKENS to at most 32768"),
        ({"batch_tokens": 9000}, "raise LLM2VEC_TOKEN_BUDGET to at least 9000"),
    ],
)
def test_limits_that_contradict_each_other_name_the_way_out(given: dict[str, Any], message: str) -> None:
    with pytest.raises(StartupError) as caught:
        limits(**given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("cost", "given", "batch_tokens"),
    [
        (CostModel(floor=5e-3, base=1e-3, per_token=25e-6), {}, 1293),  # efficient long before 0.1 s
        (CostModel(floor=5e-3, base=1e-3, per_token=1e-6), {}, 16384),  # the token budget bounds it
        (CostModel(floor=0.2, base=0.1, per_token=1e-3), {}, 512),  # slower than a batch should be: used well
        (CostModel(floor=0.02, base=5e-3, per_token=1e-4), {"batch_seconds": 0.0801}, 751),
        (CostModel(floor=5e-3, base=1e-3, per_token=25e-6), {"batch_tokens": 700}, 700),
    ],
)
def test_batches_follow_the_device(cost: CostModel, given: dict[str, Any], batch_tokens: int) -> None:
    assert limits(device="cuda", **given).for_batches(cost) == BatchLimits(batch_tokens, 16384)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_every_address_of_ipv6_is_every_address_of_ipv4_too() -> None:
    with listen("::", 0) as both:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, both.getsockname()[1]), timeout=10).close()


def test_the_configuration_page_lists_every_setting() -> None:
    assert settings_table() in (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
