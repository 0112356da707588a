from __future__ import annotations

import pytest

from service.batching.cost_model import CostModel, fit

# A 7B model on an H100, as its roofline has it: 5 ms to read the weights, 23.5 µs a token, 1 ms a batch besides.
LARGE = CostModel(floor=5.4e-3, base=1e-3, per_token=23.5e-6)


@pytest.mark.parametrize("model", [LARGE, CostModel(0.02, 0.02, 7e-4), CostModel(0.01, 0.0, 1e-6)])
def test_fit_finds_the_model_behind_exact_times(model: CostModel) -> None:
    sizes = [16, 64, 128, 256, 512, 1024, 2048, 8192, 65536]
    found = fit({tokens: model.seconds(tokens) for tokens in sizes})
    assert [found.seconds(tokens) for tokens in sizes] == pytest.approx([model.seconds(t) for t in sizes], rel=1e-6)


def test_fit_is_near_with_noise() -> None:
    noise = [1.04, 0.97, 1.02, 0.98, 1.03, 0.99, 1.01]
    sizes = [16, 64, 256, 512, 1024, 2048, 4096]
    found = fit({tokens: LARGE.seconds(tokens) * factor for tokens, factor in zip(sizes, noise, strict=True)})
    assert found.tokens_per_second == pytest.approx(LARGE.tokens_per_second, rel=0.05)
    assert found.floor == pytest.approx(LARGE.floor, rel=0.05)


def test_a_batch_never_costs_less_than_nothing_before_its_tokens() -> None:
    assert fit({16: 0.001, 64: 0.007, 256: 0.03}).base == 0


@pytest.mark.parametrize("measured", [{16: 1.0}, {16: 1.0, 64: 0.5}])
def test_what_shows_no_rate_is_refused(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="measure"):
        fit(measured)


def test_sizes_that_follow() -> None:
    assert LARGE.crossover_tokens == pytest.approx(187, abs=1)
    efficient = LARGE.efficient_tokens()
    assert efficient / LARGE.seconds(efficient) == pytest.approx(0.97 * LARGE.tokens_per_second, rel=1e-3)
    assert LARGE.seconds(LARGE.tokens_within(0.05)) <= 0.05 < LARGE.seconds(LARGE.tokens_within(0.05) + 1)
    assert LARGE.tokens_within(0.001) == 0


@pytest.mark.parametrize("saved_seconds", [0.0, 1e-5, 1e-4, 5e-3])
@pytest.mark.parametrize("computed", [16, 264, 512, 1024])
def test_filling_up_is_worth_it_as_long_as_it_costs_less_than_it_saves(computed: int, saved_seconds: float) -> None:
    least = LARGE.least_tokens_worth(computed, saved_seconds)
    for tokens in range(1, computed + 1):
        costs = LARGE.seconds(computed) - LARGE.seconds(tokens)
        assert (tokens >= least) == (costs <= saved_seconds + 1e-12)
