"""Fine-tuning end to end on tiny models: data, packing, resume, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optlm.checkpoint import open_checkpoint
from optlm.config import OPTConfig
from optlm.engine.llm import LLM
from optlm.errors import ConfigError
from optlm.model import IGNORE, OPT
from optlm.train.finetune.adapters import Adapted, AdapterConfig, attach
from optlm.train.finetune.examples import Example
from optlm.train.finetune.finetune import FinetuneConfig, finetune
from optlm.train.finetune.forgetting import ForgettingMeter, own_texts
from optlm.train.finetune.packing import PackedBatches, make_rows
from optlm.train.run.folder import RunFolder, TrainingError
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", VARIANTS[request.param])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "base", VARIANTS["base"])


def checkpoint(path: Path, config: OPTConfig) -> Path:
    state = make_state(config)
    return write_checkpoint(path, config, {name: 0.5 * value for name, value in state.items()})


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    texts = [{"text": f"the cat number {i} sat on the mat " * (1 + i % 3)} for i in range(12)]
    pairs = [{"prompt": f"say {i}: ", "response": "the rain again"} for i in range(6)]
    return write(tmp_path / "data.jsonl", *texts, *pairs)


def short(method: str = "lora", **values: Any) -> FinetuneConfig:
    settings = {"max_steps": 4, "batch_tokens": 64, "micro_batch_tokens": 64, "seq_len": 32}
    return FinetuneConfig(**({"method": method, **settings, "evaluate_every": 2} | values))


# ---- packing -------------------------------------------------------------------------------------

EXAMPLES = [Example([2, *range(10 * n, 10 * n + 3 * n), 2], first=1 + n % 3) for n in range(1, 9)]


def gradients(adapted: Adapted, rows: list[list[Example]]) -> tuple[float, list[torch.Tensor]]:
    loss = adapted.loss(make_rows(rows, pad=1))
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    return float(loss.total.detach()), list(torch.autograd.grad(loss.total / loss.count, weights))


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
def test_packed_equals_one_by_one(folder: Path, method: str) -> None:
    model = OPT.from_checkpoint(folder)
    if method == "full":
        adapted = Adapted(model, method="full")
    else:
        config = AdapterConfig(method=method, virtual_tokens=3, target_modules=("all-linear",))
        torch.manual_seed(0)
        adapted = attach(model, config, torch.tensor([9, 8, 7]))
    adapted.eval()
    packed = gradients(adapted, [EXAMPLES[:5], EXAMPLES[5:6], EXAMPLES[6:]])
    single = gradients(adapted, [[example] for example in EXAMPLES])
    assert packed[0] == pytest.approx(single[0], rel=1e-5)
    for a, b in zip(packed[1], single[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6 + 1e-4 * float(b.abs().max()))


def test_batches_hold_every_example_once_an_epoch_and_know_no_past() -> None:
    def batches() -> PackedBatches:
        return PackedBatches(EXAMPLES, row_tokens=30, batch_rows=2, micro_rows=1, pad=1, seed=4)

    one = batches()
    first = one.batch(0)
    steps = one._first_steps[1]
    seen = [rows for step in range(steps) for rows in one.batch(step)]
    tokens = sorted(int(t) for rows in seen for t in rows.targets.flatten() if t != IGNORE)
    assert tokens == sorted(t for e in EXAMPLES for t in e.tokens[e.first :])
    late, fresh = one.batch(3 * steps + 1), batches()
    for a, b in zip(late, fresh.batch(3 * steps + 1), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    for a, b in zip(first, fresh.batch(0), strict=True):
        assert torch.equal(a.tokens, b.tokens)
    assert max(rows.tokens.shape[1] for rows in seen) <= 30


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "prefix", "prompt"])
def test_a_run_of_every_method(folder: Path, method: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = {"full": 1e-3, "lora": 1e-2, "prefix": 1e-2, "prompt": 1e-2}
    result = finetune(folder, data, out, short(method, learning_rate=rates[method]))
    assert result.kl_to_base > 0
    scores = [e["score"] for e in RunFolder(out).events() if e["kind"] == "valid"]
    assert scores[-1] < scores[0]
    assert method in ("prefix", "prompt") or result.best_loss < result.base_loss
    for place in (out, out / "last"):
        where: dict[str, Any] = {"model": place} if method == "full" else {"adapter": place}
        llm = LLM(where.pop("model", folder), backend="torch", device="cpu", **where)
        assert llm.generate("the cat")[0].token_ids
    if method != "full":
        held = RunFolder(out).load(4)["model"]
        assert held
        assert all("lora" in name or name == "prompt" for name in held)


def test_stopped_and_resumed_is_the_same(base: Path, data: Path, tmp_path: Path) -> None:
    config = short(adapter=AdapterConfig(dropout=0.2), max_steps=6, learning_rate=1e-2)
    whole = finetune(base, data, tmp_path / "whole", config)

    def stop(message: str) -> None:
        if "held-out loss of the base" in message:
            steps = iter(range(100))
            original = Adapted.loss

            def counted(self: Adapted, rows: Any) -> Any:
                if self.training and next(steps) == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                return original(self, rows)

            patch.setattr(Adapted, "loss", counted)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        finetune(base, data, tmp_path / "parts", config, log=stop)
    said: list[str] = []
    parts = finetune(base, data, tmp_path / "parts", config, log=said.append)
    assert any("resuming after step" in line for line in said)
    assert parts == whole
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        a, b = (tmp_path / run / name for run in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()


def test_forgetting_is_noticed(base: Path, tmp_path: Path) -> None:
    """Full training on noise moves the model from its base; no training does not."""
    model = OPT.from_checkpoint(base)
    meter = ForgettingMeter(Adapted(model, method="full"), own_texts(model, seed=1))
    assert meter(Adapted(model, method="full")) == pytest.approx(0.0, abs=1e-6)
    random = np.random.default_rng(0)
    noise = [{"text": "".join(map(chr, random.integers(33, 127, 40)))} for _ in range(20)]
    path = write(tmp_path / "noise.jsonl", *noise)
    result = finetune(base, path, tmp_path / "out", short("full", learning_rate=0.01, max_steps=8))
    assert result.kl_to_base > 0.05


def test_it_stops_early_and_says_when_nothing_got_better(base: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "t.jsonl", {"text": "again and again and again"})
    valid = write(tmp_path / "v.jsonl", {"text": "zebra, quick! 789"})
    said: list[str] = []
    config = short("full", max_steps=40, evaluate_every=1, patience=2, learning_rate=0.05)
    result = finetune(base, train, tmp_path / "o", config, valid=valid, log=said.append)
    assert result.step < 40
    assert any("stopped after step" in line for line in said)
    if result.best_loss >= result.base_loss:
        assert any("no step was better than the base" in line for line in said)


def test_neutral_text_can_be_given(base: Path, data: Path, tmp_path: Path) -> None:
    neutral = tmp_path / "n.txt"
    neutral.write_text("the other cats went home in the rain")
    result = finetune(base, data, tmp_path / "o", short(learning_rate=0.01), neutral=neutral)
    assert result.kl_to_base > 0


# ---- refusals ------------------------------------------------------------------------------------


def test_another_run_and_another_trainer(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    finetune(base, data, out, short())
    with pytest.raises(ConfigError, match=r"different: .*seed"):
        finetune(base, data, out, short(seed=2))
    other = write(tmp_path / "other.jsonl", {"text": "the cat"}, {"text": "a mat"})
    with pytest.raises(ConfigError, match="different: data"):
        finetune(base, other, out, short())
    held = json.loads((out / "run.json").read_text())
    with RunFolder(out).locked(held), pytest.raises(TrainingError, match="another trainer"):
        finetune(base, data, out, short())


def test_a_loss_that_is_no_number(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Adapted.loss

    def broken(self: Adapted, rows: Any) -> Any:
        loss = original(self, rows)
        return dataclasses.replace(loss, total=loss.total * float("nan")) if self.training else loss

    monkeypatch.setattr(Adapted, "loss", broken)
    with pytest.raises(TrainingError, match="nan"):
        finetune(base, data, tmp_path / "o", short())


def test_a_full_disk(base: Path, data: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 64 KB: the weights of the full model do not fit."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (65536, {resource.RLIM_INFINITY}));"
        "from optlm.cli import run;"
        f"sys.exit(run(['finetune', '-m', {str(base)!r}, '--data', {str(data)!r}, '--out', "
        f"{str(tmp_path / 'o')!r}, '--method', 'full', '--max-steps', '1', '--seq-len', '32', "
        "'--batch-tokens', '32', '--micro-batch-tokens', '32']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "o").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lore"}, "did you mean 'lora'"),
        ({"max_steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"precision": "f8"}, "precision is 'f8'"),
        ({"method": "full", "adapter": AdapterConfig()}, "no settings of adapters"),
        ({"method": "prefix", "adapter": AdapterConfig()}, "has the settings of 'lora'"),
        ({"seq_len": 100}, "the context of the model is 64"),
        ({"batch_tokens": 8, "seq_len": 32}, "batch_tokens is 8"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**values).row_tokens(VARIANTS["base"])


def test_the_command_line(base: Path, data: Path, tmp_path: Path, capfd: Any) -> None:
    from optlm.cli import run

    common = ["finetune", "-m", str(base), "--data", str(data), "--out", str(tmp_path / "o")]
    small = [
        "--max-steps",
        "2",
        "--seq-len",
        "32",
        "--batch-tokens",
        "64",
        "--micro-batch-tokens",
        "64",
    ]
    assert run([*common, *small, "--rank", "2", "--dora", "--target-modules", "fc1", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["step"] == 2
    assert f"--adapter {tmp_path / 'o'}" in err
    generate = ["generate", "the cat", "-m", str(base), "--max-tokens", "3"]
    assert run([*generate, "--adapter", str(tmp_path / "o")]) == 0
    assert run(["score", "-t", "the cat", "-m", str(base), "--adapter", str(tmp_path / "o")]) == 0
    assert run([*generate, "--force"]) == 2
    assert run([*common, "--method", "prefix", "--rank", "3"]) == 2
    assert "--rank is of --method lora, not prefix" in capfd.readouterr().err


def test_precision_bf16_trains(base: Path, data: Path, tmp_path: Path) -> None:
    result = finetune(base, data, tmp_path / "o", short(precision="bf16", learning_rate=0.01))
    assert result.best_loss < result.base_loss
    assert open_checkpoint(base).config.tie_word_embeddings
