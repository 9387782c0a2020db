"""The plan agrees with what was published about OPT-175B, and with itself."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optlm.config import PUBLISHED
from optlm.errors import ConfigError
from optlm.train.pretrain.planner import PlanRequest, plan, render, request_for, training_flops
from variants import VARIANTS

PAGE = Path(__file__).parents[3] / "docs" / "scale.md"


def opt_175b(**values: Any) -> PlanRequest:
    given = {"gpus": 992, "tensor": 8, "tflops": 147.0, "tokens": 300e9, "scheme": "paper"}
    return request_for("175b", **(given | values))


def test_published_figures() -> None:
    """Chronicles, final update: 4.30e23 FLOPs, about 33 days on 1024 A100s. Paper: 992, 147."""
    assert plan(opt_175b()).flops == pytest.approx(4.30e23, rel=0.002)
    assert plan(opt_175b(gpus=1024)).days == pytest.approx(33, abs=0.5)
    assert plan(opt_175b()).days == pytest.approx(34.1, abs=0.1)
    assert plan(opt_175b()).parameters == 174_604_468_224
    assert plan(opt_175b()).steps == 150_000


def test_flops_are_those_of_megatron() -> None:
    """96 B S l h^2 (1 + S / 6h + V / 16lh) for all layers run again (arXiv 2104.04473, eq. 3).

    It counts the head three times, as we do.
    """
    for size in ("125m", "1.3b", "175b"):
        config = PUBLISHED[size].config
        layers, h = config.num_hidden_layers, config.hidden_size
        s, v = config.max_position_embeddings, config.vocab_size
        wanted = 96 * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
        assert training_flops(config, recompute=True) == pytest.approx(wanted, rel=1e-12)


def test_memory_is_the_sum_of_its_parts_and_fits() -> None:
    result = plan(opt_175b())
    state = next(iter(result.memory_gb.values()))
    assert state == pytest.approx(16 * 174_604_468_224 / 992 / 1e9)
    assert result.fits
    assert sum(result.memory_gb.values()) < 80
    one, eight = (plan(opt_175b(sequences=n)).memory_gb["activations"] for n in (1, 8))
    assert eight == pytest.approx(8 * one)


def test_fewer_sequences_at_once_cost_traffic() -> None:
    one, eight = plan(opt_175b(sequences=1)), plan(opt_175b(sequences=8))
    assert one.micro_batches == 8 * eight.micro_batches
    assert one.data_traffic_gb == pytest.approx(8 * eight.data_traffic_gb)
    assert one.tensor_traffic_gb == eight.tensor_traffic_gb


def test_traffic_by_hand() -> None:
    """Weights twice and gradients once, two bytes each, of an eighth of the model."""
    result = plan(opt_175b())
    share = 174_604_468_224 / 8
    assert result.data_traffic_gb == pytest.approx(6 * share * 123 / 124 / 1e9)
    assert plan(opt_175b(tensor=1, sequences=1)).tensor_traffic_gb == 0
    assert plan(opt_175b(gpus=8, sequences=1)).data_traffic_gb == 0


def test_too_small_a_memory_is_said() -> None:
    result = plan(opt_175b(memory_gb=5.0))
    assert not result.fits
    assert "DOES NOT FIT" in render(opt_175b(memory_gb=5.0), result)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_can_be_planned(variant: str) -> None:
    config = dataclasses.replace(VARIANTS[variant], num_attention_heads=4)
    request = PlanRequest(
        config=config, tokens=1e6, batch_tokens=4096, gpus=4, tensor=2, tflops=0.1
    )
    result = plan(request)
    assert result.parameters == config.parameter_count()
    assert result.fits
    assert "days" in render(request, result)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpus": 991}, "991 GPUs cannot be divided into groups of 8"),
        ({"gpus": 0}, "gpus is 0; it must be above 0"),
        ({"tensor": 62}, "num_attention_heads 96 is not divisible by tensor parallelism 62"),
        ({"gpus": 99_200}, "less than one sequence of 2048 each"),
        ({"scheme": "int8"}, "scheme is 'int8'"),
        ({"sequences": 0}, "sequences is 0"),
        ({"tflops": float("nan")}, "tflops is nan"),
    ],
)
def test_nonsense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        opt_175b(**values)


def test_unknown_size() -> None:
    with pytest.raises(ConfigError, match=r"no size '175'; the sizes are 125m, .*175b"):
        request_for("175", gpus=8, tflops=1.0, tokens=1e9)


# ---- the page and the command -------------------------------------------------------------------


def test_the_page_tells_what_is_computed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert render(opt_175b(), plan(opt_175b())) in page
    for figure in (
        f"| {plan(opt_175b()).flops:.3g} |",
        f"| {plan(opt_175b(gpus=1024)).days:.1f} days at 147 TFLOP/s |",
        f"| {plan(opt_175b()).days:.1f} days |",
    ):
        assert figure in page, figure


def test_the_command_of_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("$ optlm pretrain --plan"))
    arguments = line.removeprefix("$ optlm ").split()
    code = (
        "import sys; from optlm.cli import run; code = run(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, *extra],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        if extra:
            assert json.loads(done.stdout) == dataclasses.asdict(plan(opt_175b()))
        else:
            assert done.stdout.strip() in page
