"""Plans against arithmetic by hand; test_simulation.py holds what they promise against the policy."""

from __future__ import annotations

import json
import re

import pytest

from model_store.build.sources import shape_of
from service.cli import main
from service.planning.gpus import PlanError, gpu_named, gpus
from service.planning.plan import Asked, Bulk, Plan, Serving
from service.planning.report import as_json, as_table, seconds_of

LARGE = shape_of("meta-llama/Meta-Llama-3-8B-Instruct")
SMALL = shape_of("princeton-nlp/Sheared-LLaMA-1.3B")
H100 = gpu_named("h100-sxm")
DAY = 86400.0


def test_at_full_efficiency_it_is_the_roofline() -> None:
    cost = Plan(LARGE, H100, Asked(efficiency=1.0)).cost
    flops = 2 * 6_979_321_856 + 4 * 128 * 4096 * 32
    assert cost.tokens_per_second == pytest.approx(989.4e12 / flops)
    assert cost.floor - cost.base == pytest.approx(2 * 6_979_321_856 / (0.9 * 3.35e12))


def test_what_is_assumed_is_near_the_estimates_it_comes_from() -> None:
    rates = {"8B": 42_500, "1.3B": 220_000, "270M": 1_250_000}
    for name, shape in {"8B": LARGE, "1.3B": SMALL, "270M": shape_of("demo:")}.items():
        assert Plan(shape, H100, Asked()).cost.tokens_per_second == pytest.approx(rates[name], rel=0.02), name


def test_a_server_s_calibration_takes_the_place_of_what_is_assumed() -> None:
    plan = Plan(LARGE, H100, Asked(timed=(38_000, 6e-3)))
    assert plan.cost.tokens_per_second == pytest.approx(38_000)
    assert plan.lone_seconds == 6e-3
    bases = {figure.name: figure.basis for figure in plan.figures()}
    assert bases["tokens_per_second"] == bases["share_of_peak"] == "measured"
    longer = Plan(LARGE, H100, Asked(bulk=Bulk(1, 4096, DAY), timed=(38_000, 6e-3)))
    assert longer.cost.tokens_per_second == pytest.approx(
        38_000 * LARGE.flops_per_token(128) / LARGE.flops_per_token(4096)
    )


def test_fp8_is_faster_and_smaller() -> None:
    plain, fp8 = Plan(LARGE, H100, Asked()), Plan(LARGE, H100, Asked(quantization="fp8"))
    assert fp8.cost.tokens_per_second == pytest.approx(1.4 * plain.cost.tokens_per_second, rel=0.001)
    assert fp8.lone_seconds < 0.65 * plain.lone_seconds
    assert fp8.memory["weights"] == plain.memory["weights"] - LARGE.linear_parameters
    with pytest.raises(PlanError, match=r"A100 80 GB has no fp8, which h100-sxm, .* leave out --quantization"):
        Plan(LARGE, gpu_named("a100-80gb"), Asked(quantization="fp8"))


def test_without_bfloat16_it_is_float32() -> None:
    plan = Plan(SMALL, gpu_named("t4"), Asked())
    assert plan.memory["weights"] == 4 * SMALL.parameters
    assert "no bfloat16 on this GPU: set LLM2VEC_DTYPE=float32" in plan.assumptions()


def test_an_unknown_gpu_is_told_those_that_are_known() -> None:
    assert gpu_named("H100-SXM") == H100
    with pytest.raises(PlanError, match=r"no GPU 'h900' is known: use one of h100-sxm, .*, rtx-4090"):
        gpu_named("h900")


def test_the_table_of_gpus_is_of_dense_peaks() -> None:
    for gpu in gpus().values():
        assert gpu.source
        if "fp8" in gpu.peaks:
            assert 1.9 < gpu.peaks["fp8"] / gpu.peaks["bfloat16"] < 2.1, gpu.key  # sparse beside dense would be 4 or 1
        assert 1e12 * gpu.peaks.get("bfloat16", 8e12) / gpu.bandwidth > 1e13  # FLOP a byte, in tens and hundreds


@pytest.mark.parametrize(
    ("gpu", "budget", "ways"), [("l4", 65536, ["token-budget", "quantization", "gpu"]), ("t4", 16384, ["gpu"])]
)
def test_a_model_too_large_for_the_memory_names_ways_out_that_lead_out(gpu: str, budget: int, ways: list[str]) -> None:
    with pytest.raises(PlanError, match="are needed") as caught:
        Plan(LARGE, gpu_named(gpu), Asked(token_budget=budget))
    message = str(caught.value)
    assert re.findall(r"--([a-z-]+)", message) == ways
    if found := re.search(r"--token-budget (\d+)", message):
        most = int(found[1])
        Plan(LARGE, gpu_named(gpu), Asked(token_budget=most))
        with pytest.raises(PlanError):
            Plan(LARGE, gpu_named(gpu), Asked(token_budget=most + 1024))
        Plan(LARGE, gpu_named(gpu), Asked(token_budget=budget, quantization="fp8"))
    for other in re.findall(r"[\w-]+", message.split("--gpu ")[1]):
        Plan(LARGE, gpu_named(other), Asked(token_budget=budget))


def test_a_text_that_the_model_can_t_read_is_refused() -> None:
    with pytest.raises(PlanError, match=r"reads 4096 tokens .* texts of 5000 have to be cut"):
        Plan(SMALL, H100, Asked(bulk=Bulk(10, 5000, DAY)))


@pytest.mark.parametrize("texts", [1, 10**8, 10**10])
def test_as_many_gpus_as_a_job_needs_and_none_more(texts: int) -> None:
    plan = Plan(LARGE, H100, Asked(bulk=Bulk(texts, 256, DAY)))
    done = plan.tokens_per_second * DAY
    assert (plan.gpus - 1) * done < texts * 256 <= plan.gpus * done
    figures = {figure.name: figure.value for figure in plan.figures()}
    assert figures["bulk_gpu_hours"] == pytest.approx(texts * 256 / plan.tokens_per_second / 3600)
    assert figures["vectors_float32"] == 32 * figures["vectors_binary"] == texts * 4096 * 4


def test_longer_texts_cost_more_a_token() -> None:
    rates = [Plan(LARGE, H100, Asked(bulk=Bulk(1, tokens, DAY))).cost.tokens_per_second for tokens in (128, 8192)]
    assert rates[0] / rates[1] == pytest.approx(LARGE.flops_per_token(8192) / LARGE.flops_per_token(128))
    assert rates[0] > 1.25 * rates[1]


@pytest.mark.parametrize("bulk", [None, Bulk(10**9, 256, DAY)])
def test_at_the_cap_a_gpu_keeps_the_p99_and_a_little_beyond_it_does_not(bulk: Bulk | None) -> None:
    plan = Plan(LARGE, H100, Asked(bulk=bulk, serving=Serving(1000, 200, 0.07)))
    assert 0.05 < plan.utilization_cap < 0.8
    assert plan.simulated_p99(plan.utilization_cap, seed=3) <= 0.07
    assert plan.simulated_p99(plan.utilization_cap + 0.15, seed=3) > 0.07


def test_a_p99_that_can_t_be_had_says_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"99 % of queries in 5 ms .* allow more with --p99, or take a faster GPU$"):
        Plan(LARGE, H100, Asked(serving=Serving(10, p99=0.005))).figures()
    with pytest.raises(PlanError, match=r"\(--batch-seconds\) or other GPUs for bulk$"):
        Plan(LARGE, H100, Asked(bulk=Bulk(10, 256, DAY), serving=Serving(10, p99=0.03))).figures()
    smaller = Asked(bulk=Bulk(10, 256, DAY), serving=Serving(10, p99=0.05), batch_seconds=0.015)
    assert Plan(LARGE, H100, smaller).utilization_cap > 0


def test_table_and_json_say_the_same() -> None:
    asked = Asked(bulk=Bulk(10**9, 256, DAY), serving=Serving(2000), dimensions=1024, price=2.0)
    plans = [Plan(LARGE, gpu_named(name), asked) for name in ("h100-sxm", "h200")]
    table, document = as_table("it", plans), as_json("it", plans)
    for plan in plans:
        figures = document["gpus"][plan.gpu.key]["figures"]
        for figure in plan.figures():
            assert figures[figure.name] == {"value": figure.value, "unit": figure.unit, "basis": figure.basis}
            line = next(line for line in table.splitlines() if line.startswith(figure.name.replace("_", " ") + "  "))
            assert figure.text in line
            assert line.endswith(figure.basis)
    assert json.loads(json.dumps(document)) == document
    hours, price = (document["gpus"]["h200"]["figures"][name]["value"] for name in ("bulk_gpu_hours", "bulk_price"))
    assert price == 2 * hours


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("90s", 90), ("30m", 1800), ("24h", 86400), ("1.5d", 129600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--texts", "5"], "a bulk job is --texts N and --tokens-per-text N"),
        (["--texts", "5", "--tokens-per-text", "5", "--within", "1 day"], "'1 day' is no duration: write 50ms"),
        (["--queries-per-second", "-1"], "--queries-per-second is -1: give a number above 0"),
        (["--efficiency", "1.5"], "--efficiency is a share"),
        (["--timed", "0", "5"], "--timed is 0: give a number above 0"),
        (["--model", "llama9"], "use one of demo, llama2-7b-mntp"),
        (["--gpu", "h900"], "no GPU 'h900' is known"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--gpu", "l4", *options]) == 1
    assert sentence in capsys.readouterr().err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "demo", "--gpu", "l4", "h200", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["gpus"]) == ["l4", "h200"]


def test_every_packaged_recipe_s_memory_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("llama3-8b-mntp"))
    needed = sum(Plan(LARGE, H100, Asked()).memory.values()) / 1e9
    assert f"15.0 GB {needed:6.1f} GB" in line
