"""The other commands: what they print and how they end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import Run

from optlm import PUBLISHED
from optlm.checkpoint import open_checkpoint
from variants import VARIANTS

TEXT = "the cat sat on the mat"


# ---- info, doctor, convert ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_info_of_a_checkpoint(run: Run, models: dict[str, Path], variant: str) -> None:
    config = VARIANTS[variant]
    card = json.loads(run("info", models[variant], "--json").out)
    assert card["parameters"] == config.parameter_count()
    assert card["variant"] == config.variant
    assert card["weight_bytes"]["bf16"] == 2 * config.parameter_count()
    plain = run("info", models[variant]).out
    assert f"{config.parameter_count():,}" in plain
    assert "vocabulary" in plain


@pytest.mark.parametrize("name", [*PUBLISHED, "OPT-6.7B"])
def test_info_of_a_published_size(run: Run, name: str) -> None:
    card = json.loads(run("info", name, "--json").out)
    size = PUBLISHED[name.lower().removeprefix("opt-")]
    assert card["layers"] == size.config.num_hidden_layers
    assert card["learning_rate"] == size.learning_rate


def test_info_without_a_usable_tokenizer(run: Run, base: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    result = run("info", tmp_path)
    assert result.code == 0
    assert "none that can be used" in result.out


def test_doctor(run: Run, base: Path, tmp_path: Path) -> None:
    assert run("doctor", base) == (0, f"{base}: sound\n", "")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 8)
    broken = run("doctor", tmp_path)
    assert broken.code == 2
    assert broken.out.startswith("error: ")
    assert broken.out.endswith("1 error\n")
    record = json.loads(run("doctor", tmp_path, "--json").out.splitlines()[0])
    assert {"code", "where", "message", "severity"} <= set(record)


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16"])
def test_convert(run: Run, models: dict[str, Path], tmp_path: Path, dtype: str | None) -> None:
    out = tmp_path / "out"
    options = ("--dtype", dtype) if dtype else ()
    result = run("convert", models["350m"], out, *options)
    assert result == (0, "", f"optlm: wrote {out}\n")
    stored = {tensor.dtype for tensor in open_checkpoint(out).tensors.values()}
    assert stored == {(dtype or "f32").upper()}
    assert run("generate", "the", "-m", out, "--max-tokens", 2).code == 0


def test_convert_refuses_an_unknown_dtype(run: Run, base: Path, tmp_path: Path) -> None:
    result = run("convert", base, tmp_path / "out", "--dtype", "fp16")
    assert result.code == 2
    assert "fp16" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_convert_packed(
    run: Run, models: dict[str, Path], tmp_path: Path, variant: str, dtype: str
) -> None:
    greedy = ("--temperature", 0, "--max-tokens", 8, "--threads", 1)
    expected = run("generate", "the", "-m", models[variant], "--dtype", dtype, *greedy)
    assert run("convert", models[variant], tmp_path / "out", "--packed", "--dtype", dtype).code == 0
    assert run("generate", "the", "-m", tmp_path / "out", *greedy) == expected
    assert run("doctor", tmp_path / "out").code == 0
    assert dtype in json.loads(run("info", tmp_path / "out", "--json").out)["files"]


def test_packed_needs_a_format(run: Run, base: Path, tmp_path: Path) -> None:
    result = run("convert", base, tmp_path / "out", "--packed")
    assert result.code == 2
    assert "f32, f16, bf16, int8" in result.err


# ---- bench, pretrain, the rest ------------------------------------------------------------------


def test_bench(run: Run, base: Path) -> None:
    small = ("--tokens", 4, "--prompt-tokens", 8, "--repeat", 2, "--batch", 2, "--threads", 1)
    report = json.loads(run("bench", "-m", base, *small, "--json").out)
    assert report["batch"] == 2
    assert report["memory_read_gb_per_s"] > 0.1
    assert report["decode_tokens_per_s"] == pytest.approx(2e3 / report["step_ms"])
    assert "decode tokens per s" in run("bench", "-m", base, *small).out


def test_bench_beyond_the_context(run: Run, base: Path) -> None:
    result = run("bench", "-m", base, "--tokens", 64)
    assert result.code == 2
    assert "context of 64" in result.err


def test_pretrain_names_a_bad_configuration(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    result = run("pretrain", tmp_path / "run.json", "--out", tmp_path / "run")
    assert result.code == 2
    assert result.err.startswith("optlm: error: ")
    assert "\n" not in result.err.rstrip("\n")


@pytest.mark.parametrize("end", [None, KeyboardInterrupt, OSError(28, "No space left", "run")])
def test_pretrain_hands_over_and_tells_how_it_ended(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException | None
) -> None:
    from optlm.train.pretrain import pretrain as module

    seen: list[object] = []

    def train(config: object, out: Path, *, data_folder: Path | None, **_: object) -> None:
        seen.extend([config, out, data_folder])
        if end is not None:
            raise end

    monkeypatch.setattr(module.PretrainConfig, "from_file", lambda path: path.name)
    monkeypatch.setattr(module, "pretrain", train)
    result = run("pretrain", "run.json", "--out", tmp_path, "--data", tmp_path / "data")
    assert seen == ["run.json", tmp_path, tmp_path / "data"]
    assert result.code == {None: 0, KeyboardInterrupt: 130}.get(end, 1)  # type: ignore[call-overload]
    if end is KeyboardInterrupt:
        assert f"resumes from {tmp_path}" in result.err
    elif end:
        assert result.err == "optlm: error: run: No space left\n"


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.startswith("optlm 0.")
    shown = run("--help").out
    for command in ("generate", "score", "info", "doctor", "convert", "pretrain", "bench"):
        assert command in shown
        assert run(command, "--help").code == 0
    assert run() == (0, shown, "")
    unknown = run("generat")
    assert unknown.code == 2
    assert "did you mean 'generate'?" in unknown.err
