"""From text files to a model: the whole way, stopped, resumed and exported."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import story, write_corpus

from optlm import cli
from optlm.assets import bundled_model
from optlm.errors import CheckpointError, ConfigError
from optlm.model import OPT
from optlm.train.pretrain import pretrain as module
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig, recipe_names
from optlm.train.pretrain.validate import bits_per_byte, sample
from optlm.train.run.export import export_run
from optlm.train.run.folder import RunFolder, TrainingError
from optlm.train.tokens.corpus import CorpusError


def bits(model: OPT) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["f32", "bf16", "f16"])
def test_killed_process_resumes_to_the_same_bits(
    recipe: dict[str, Any], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PretrainConfig.from_dict(recipe | {"precision": precision})
    whole = pretrain(config, tmp_path / "whole")
    plain = module._loss

    def killed(config: PretrainConfig) -> object:
        loss = plain(config)

        def until_killed(model: OPT, rows: module.Rows) -> object:
            if RunFolder(tmp_path / "cut").checkpoint(6).exists():
                raise MemoryError
            return loss(model, rows)

        return until_killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "_loss", killed)
        with pytest.raises(MemoryError):
            pretrain(config, tmp_path / "cut")
    assert bits(pretrain(config, tmp_path / "cut")) == bits(whole)


def test_log_holds_bits_per_byte_and_samples(config: PretrainConfig, tmp_path: Path) -> None:
    told: list[str] = []
    pretrain(config, tmp_path / "run", log=told.append)
    assert any("packed tales: 60 documents" in line for line in told)
    events = RunFolder(tmp_path / "run").events()
    valid = [event for event in events if event["kind"] == "valid"]
    assert [event["step"] for event in valid] == [6, 12]
    assert 0 < valid[-1]["bits_per_byte"]["stories"] < valid[0]["bits_per_byte"]["stories"] < 8
    assert valid[-1]["samples"][0].startswith("the cat")
    assert [e["step"] for e in events if e["kind"] == "train"] == [2, 4, 6, 8, 10, 12]


def test_micro_batches_change_only_rounding(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["model"]["dropout"] = 0.0
    large = PretrainConfig.from_dict(recipe | {"precision": "f32"})
    small = dataclasses.replace(large, micro_batch_tokens=32)
    a = pretrain(large, tmp_path / "a").state_dict()
    b = pretrain(small, tmp_path / "b").state_dict()
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_broken_lines_are_reported(recipe: dict[str, Any], tmp_path: Path) -> None:
    file = Path(write_corpus(tmp_path / "x.jsonl", [{"text": story(i)} for i in range(40)]))
    file.write_bytes(file.read_bytes() + b"{broken\n")
    recipe["data"]["parts"] = [{"name": "x", "file": str(file), "weight": 1}]
    recipe["loop"]["steps"] = 1
    told: list[str] = []
    pretrain(PretrainConfig.from_dict(recipe), tmp_path / "run", log=told.append)
    assert any("left out 1 broken lines (x.jsonl:41: " in line for line in told)


def test_empty_sets_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    recipe["data"]["validation"] = {"none": str(empty)}
    with pytest.raises(CorpusError, match=r"'none'.*empty\.jsonl"):
        pretrain(PretrainConfig.from_dict(recipe), tmp_path / "a")
    recipe["data"]["parts"][0] |= {"file": str(empty), "sources": []}
    with pytest.raises(CorpusError, match="'tales'"):
        pretrain(PretrainConfig.from_dict(recipe), tmp_path / "b")


# ---- bits per byte ------------------------------------------------------------------------------


def test_uniform_model_needs_log2_of_the_vocabulary(config: PretrainConfig) -> None:
    model = OPT(config.model).eval()
    with torch.no_grad():
        model.head_weight.zero_()
    documents = [[2, *range(10, 10 + length)] for length in (5, 64, 65, 150)]
    predicted = sum(len(ids) - 1 for ids in documents)
    wanted = predicted * math.log2(300) / 1000
    assert bits_per_byte(model, documents, 1000) == pytest.approx(wanted, rel=1e-5)


def test_bits_per_byte_is_the_models_own_loss(config: PretrainConfig) -> None:
    torch.manual_seed(0)
    model = OPT(config.model).eval()
    ids = [2, 17, 40, 33, 250]
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert loss is not None
    assert bits_per_byte(model, [ids], 9) == pytest.approx(float(loss) * 4 / math.log(2) / 9)


def test_sampling_leaves_the_random_state_alone(config: PretrainConfig) -> None:
    model = OPT(config.model).eval()
    before = torch.get_rng_state()
    first = sample(model, [2, 9], count=500, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert first == sample(model, [2, 9], count=500, seed=1)
    assert len(first) <= config.model.max_position_embeddings


# ---- the bundled model ---------------------------------------------------------------------------


def test_recipe_beside_the_bundled_model_describes_it() -> None:
    folder = bundled_model()
    recipe = PretrainConfig.from_file(folder / "pretrain.json")
    assert OPT.from_checkpoint(folder).config == recipe.model
    vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    assert len(vocabulary) == recipe.data.vocab_size


# ---- recipes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["lop"], {}, "unknown key 'lop'.*did you mean 'loop'"),
        (["loop", "step"], 5, "unknown key 'step'.*did you mean 'steps'"),
        (["loop", "optim", "learning_rte"], 5, "learning_rate"),
        (["loop", "steps"], "many", "steps"),
        (["loop", "steps"], True, "steps"),
        (["data"], [], "data must be a JSON object"),
        (["data", "parts"], {}, "data.parts must be a JSON list"),
        (["data", "parts"], [3], r"data.parts\[0\] must be a JSON object"),
        (["data", "parts"], [{"name": "a"}], r"data.parts\[0\] lacks file"),
        (["data", "vocab_size"], 301, "vocab_size 300 is not the tokenizer's 301"),
        (["sequence_lengths"], {"128": 1}, "128 does not fit the context of 64"),
        (["sequence_lengths"], {"24": 1}, "no multiple of sequence length 24"),
        (["sequence_lengths"], {"16": 0}, "share of length 16"),
        (["sequence_lengths"], {"a": 0}, "sequence_lengths"),
        (["sequence_lengths"], {}, "sequence_lengths is empty"),
        (["precision"], "fp8", "use one of f32, bf16, f16"),
        (["seed"], -1, "seed"),
        (["batch_tokens"], 0, "batch_tokens"),
        (["prompts"], "text", "prompts"),
        (["model", "hidden_size"], -4, "hidden_size"),
    ],
)
def test_bad_recipes_are_refused(
    recipe: dict[str, Any], path: list[str], value: Any, message: str
) -> None:
    place = recipe
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.from_dict(recipe)


def test_missing_parts_of_a_recipe_are_named(recipe: dict[str, Any]) -> None:
    del recipe["loop"]["steps"]
    with pytest.raises(ConfigError, match="loop lacks steps"):
        PretrainConfig.from_dict(recipe)


# ---- command line -------------------------------------------------------------------------------


def command(file: Path, out: Path, *others: str) -> int:
    return cli.run(["pretrain", str(file), "--out", str(out), *others])


def test_command_line(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.json", tmp_path / "run"
    file.write_text(json.dumps(recipe))
    assert command(file, out) == 0
    assert command(file, out) == 0  # finished: nothing to do
    file.write_text(json.dumps(recipe | {"seed": 4}))
    assert command(file, out) == 2
    assert "another configuration (different: seed)" in capsys.readouterr().err
    assert command(tmp_path / "none.json", out) == 2
    file.write_text("{")
    assert command(file, out) == 2
    output = capsys.readouterr()
    assert "none.json" in output.err
    assert output.out == ""
    assert cli.run(["pretrain", str(file)]) == 2
    assert "give a file of settings and --out RUN" in capsys.readouterr().err


def test_what_lies_ahead_may_change_when_allowed(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.json", tmp_path / "run"
    file.write_text(json.dumps(recipe))
    assert command(file, out) == 0
    recipe["loop"]["steps"] = 15
    file.write_text(json.dumps(recipe))
    assert command(file, out) == 2
    assert "(different: loop.steps)" in capsys.readouterr().err
    assert command(file, out, "--allow-change", "loop.step") == 2
    assert "did you mean 'loop.steps'" in capsys.readouterr().err
    assert command(file, out, "--allow-change", "loop.steps") == 0
    assert "resuming after step 12 of 15" in capsys.readouterr().err
    assert "`loop.steps`: 12 -> 15" in (out / "logbook.md").read_text()
    assert command(file, out) == 0


def test_data_that_changed_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = PretrainConfig.from_dict(recipe)
    pretrain(config, tmp_path / "run", data_folder=tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    manifest["parts"]["notes"]["sha256"] = "0" * 64
    (tmp_path / "packed" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"changed since \(parts\.notes\)"):
        pretrain(config, tmp_path / "run", data_folder=tmp_path / "packed")


def test_spike_in_the_text_is_found_in_the_logbook(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A part of noise that comes in late, and where its rows lie."""
    noise = write_corpus(tmp_path / "noise.jsonl", [{"text": "zqxj" * 200}] * 3)
    late = {"name": "noise", "file": str(noise), "weight": 1e-6, "decay_weight": 1e6}
    recipe["data"]["parts"].append(late)
    recipe["loop"] |= {
        "steps": 20, "spikes": {"window": 8, "threshold": 5.0},
        "optim": {"learning_rate": 0.003, "warmup_steps": 2, "decay_share": 0.1},
    }  # fmt: skip
    pretrain(PretrainConfig.from_dict(recipe), tmp_path / "run")
    spikes = [e for e in RunFolder(tmp_path / "run").events() if e["kind"] == "spike"]
    assert spikes[0]["batch_step"] == 18
    assert {name for name, _ in spikes[0]["batch"]["rows"]} == {"noise"}
    assert len(spikes[0]["before"][0]["activations"]) == 3
    assert "layer 1" in spikes[0]["before"][0]["gradients"]


def test_every_size_shows_settings_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for name in recipe_names():
        assert cli.run(["pretrain", "--show", name]) == 0
        shown = PretrainConfig.from_dict(json.loads(capsys.readouterr().out))
        assert shown.data.parts[0].file == "train.jsonl.zst"
    assert cli.run(["pretrain", "--show", "mini"]) == 2
    assert "no recipe for model 'mini'" in capsys.readouterr().err


def test_terminated_process_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM from outside: exit code 130, and the next start goes on from the saved step."""
    recipe["loop"] |= {"steps": 100_000, "evaluate_every": 100_000, "checkpoint_every": 100_000}
    file, out = tmp_path / "recipe.json", tmp_path / "run"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "optlm", "pretrain", str(file), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not any(event["kind"] == "train" for event in RunFolder(out).events()):
            assert process.poll() is None
            time.sleep(0.2)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resumes from" in errors
    state = RunFolder(out).load_latest()
    assert state is not None
    assert state["step"] >= 2


# ---- export -------------------------------------------------------------------------------------


def test_exported_folder_loads_everywhere(config: PretrainConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run, folder = tmp_path / "run", tmp_path / "model"
    pretrain(config, run)
    best = export_run(run, folder, dtype="f32")
    latest = RunFolder(run).load_latest()
    assert latest is not None
    assert best == latest["best"][1]
    ours = OPT.from_checkpoint(folder)
    state = RunFolder(run).load(best)["average"]
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1)
    ids = torch.tensor([tokenizer("the cat sat").input_ids])
    assert ids[0, 0] == 2
    theirs = transformers.OPTForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("averaged", [True, False])
def test_export_of_one_step_in_bf16(config: PretrainConfig, tmp_path: Path, averaged: bool) -> None:
    pretrain(config, tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "model", step=12, averaged=averaged) == 12
    state = RunFolder(tmp_path / "run").load(12)["average" if averaged else "model"]
    for name, value in OPT.from_checkpoint(tmp_path / "model").state_dict().items():
        assert torch.equal(value, state[name].bfloat16().float())


def test_export_of_what_is_no_run(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder of a training run"):
        export_run(tmp_path, tmp_path / "out")
    pretrain(config, tmp_path / "run")
    with pytest.raises(TrainingError, match="step-00000999"):
        export_run(tmp_path / "run", tmp_path / "out", step=999)
    for file in (tmp_path / "run").glob("*.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export_run(tmp_path / "run", tmp_path / "out")
