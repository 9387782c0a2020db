"""`optlm merge`: proven on every variant, refused when it would change what the model says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import EVERY, TEXT, logits, made

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.lowrank import LowRank
from optlm.engine.llm import LLM
from optlm.errors import CheckpointError, ConfigError
from optlm.train.finetune.adapters import AdapterConfig
from optlm.train.finetune.merging import MAX_DRIFT, merge
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = VARIANTS[request.param]
    return write_checkpoint(tmp_path / "base", config, make_state(config))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = VARIANTS["base"]
    return write_checkpoint(tmp_path / "base", config, make_state(config))


@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_file_says_the_same(folder: Path, dora: bool, tmp_path: Path) -> None:
    """On disk and back, the head and the embedding among the targets."""
    config = AdapterConfig(rank=2, alpha=4, dora=dora, target_modules=EVERY)
    adapted, opened = made(folder, tmp_path / "a", config)
    said: list[str] = []
    report = merge(folder, tmp_path / "a", tmp_path / "m", log=said.append)
    assert report.drift <= MAX_DRIFT["f32"] / 10
    written = open_checkpoint(tmp_path / "m").config
    assert not written.tie_word_embeddings
    assert report.untied == opened.config.tie_word_embeddings == bool(said)
    (scored,) = LLM(tmp_path / "m", backend="native").score([TEXT])
    expected = logits(adapted).log_softmax(1)[:-1].gather(1, torch.tensor(TEXT)[1:, None])
    np.testing.assert_allclose(scored.logprobs[1:], expected[:, 0].numpy(), atol=2e-4)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_half_formats(folder: Path, dtype: str, tmp_path: Path) -> None:
    made(folder, tmp_path / "a", AdapterConfig(rank=2, alpha=1))
    report = merge(folder, tmp_path / "a", tmp_path / "m", dtype=dtype, max_drift=1.0)
    assert 0 < report.drift < 2 * MAX_DRIFT[dtype]  # random weights amplify more than trained ones
    tied = open_checkpoint(folder).config.tie_word_embeddings
    assert open_checkpoint(tmp_path / "m").config.tie_word_embeddings == tied


def test_a_merge_that_drifts_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(base, tmp_path / "a", AdapterConfig(rank=2))
    merge(base, tmp_path / "a", tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    right = LowRank.merged

    def wrong(self: LowRank, weight: Any) -> Any:
        return right(dataclasses.replace(self, scale=1.1 * self.scale), weight)

    monkeypatch.setattr(LowRank, "merged", wrong)
    for out in (tmp_path / "m", tmp_path / "new"):
        with pytest.raises(CheckpointError, match="changes what the model says"):
            merge(base, tmp_path / "a", out)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "base", "m"}


def test_what_is_refused(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "a", AdapterConfig(rank=2))
    with pytest.raises(CheckpointError, match="is the base itself"):
        merge(base, tmp_path / "a", base)
    with pytest.raises(ConfigError, match=r"dtype is 'f23'; .* did you mean"):
        merge(base, tmp_path / "a", tmp_path / "m", dtype="f23")
    with pytest.raises(ConfigError, match="max_drift is nan"):
        merge(base, tmp_path / "a", tmp_path / "m", max_drift=float("nan"))
    made(base, tmp_path / "p", AdapterConfig(method="prefix", virtual_tokens=3))
    with pytest.raises(CheckpointError, match="cannot be merged"):
        merge(base, tmp_path / "p", tmp_path / "m")


def test_the_command_line(base: Path, tmp_path: Path, capfd: Any) -> None:
    from optlm.cli import run

    made(base, tmp_path / "a", AdapterConfig(rank=2, target_modules=("lm_head",)))
    words = [
        "merge",
        "-m",
        str(base),
        "--adapter",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "m"),
    ]
    assert run([*words, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["untied"] is True
    assert "tie_word_embeddings" in err
    assert run(["generate", "the", "-m", str(tmp_path / "m"), "--max-tokens", "2"]) == 0
    assert run([*words, "--max-drift", "0"]) == 2
