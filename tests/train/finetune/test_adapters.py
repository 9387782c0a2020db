"""Adapters of every kind on every variant, against peft on transformers' OPT and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_models import (
    EVERY,
    EXACT,
    TEXT,
    hf,
    hf_logits,
    logits,
    made,
    merged_logits,
    rows,
    targets,
)
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from optlm.checkpoint import open_checkpoint
from optlm.checkpoint.adapter import open_adapter
from optlm.checkpoint.merge import merge_adapter
from optlm.engine.llm import LLM
from optlm.model import OPT
from optlm.train.finetune.adapters import Adapted, AdapterConfig, attach_saved
from variants import VARIANTS, make_state, write_checkpoint

pytestmark = pytest.mark.filterwarnings(  # peft calls transformers in ways that will go
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*past_key_values. is deprecated.*:FutureWarning",
)


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = VARIANTS[request.param]
    return write_checkpoint(tmp_path_factory.mktemp(request.param), config, make_state(config))


LORA = {
    "lora": AdapterConfig(rank=3, alpha=5.5),
    "rslora": AdapterConfig(rank=4, alpha=3, rslora=True, target_modules=("fc1", "k_proj")),
    "dora": AdapterConfig(rank=2, dora=True, target_modules=("all-linear",)),
}


@pytest.mark.parametrize("kind", LORA)
def test_ours_in_peft_and_merged(folder: Path, kind: str, tmp_path: Path) -> None:
    adapted, base = made(folder, tmp_path, LORA[kind])
    wanted = logits(adapted)
    assert (wanted - logits(Adapted(OPT.from_checkpoint(folder), method="full"))).abs().max() > 0.1
    torch.testing.assert_close(
        hf_logits(PeftModel.from_pretrained(hf(folder), tmp_path)), wanted, **EXACT
    )
    adapter = open_adapter(tmp_path, base)
    again = attach_saved(OPT.from_checkpoint(folder), adapter)
    torch.testing.assert_close(logits(again), wanted, **EXACT)
    torch.testing.assert_close(merged_logits(merge_adapter(base, adapter)), wanted, **EXACT)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers")
@pytest.mark.parametrize("dora", [False, True])
def test_every_matrix_made_by_peft(folder: Path, dora: bool, tmp_path: Path) -> None:
    """Head and embedding too: with a tied head peft's own merge would be wrong (peft#2018)."""
    base = open_checkpoint(folder)
    torch.manual_seed(3)
    names = list(targets(base.config))
    config = LoraConfig(r=3, target_modules=names, init_lora_weights=False, use_dora=dora)
    theirs = get_peft_model(hf(folder), config).eval()
    wanted = hf_logits(theirs)
    theirs.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path, base)
    torch.testing.assert_close(
        logits(attach_saved(OPT.from_checkpoint(folder), adapter)), wanted, rtol=0, atol=1e-4
    )
    merged = merge_adapter(base, adapter)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(merged_logits(merged), wanted, rtol=0, atol=1e-4)


def test_a_head_of_ours_on_a_tied_model(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    folder = write_checkpoint(tmp_path / "m", config, make_state(config))
    adapted, base = made(folder, tmp_path / "a", AdapterConfig(target_modules=("lm_head",)))
    assert (
        merge_adapter(base, open_adapter(tmp_path / "a", base)).config.tie_word_embeddings is False
    )
    merged = merge_adapter(base, open_adapter(tmp_path / "a", base))
    torch.testing.assert_close(merged_logits(merged), logits(adapted), **EXACT)
    batch = rows([2, *range(5, 40)])
    full = adapted.logits(adapted.hidden(batch)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(full, batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(adapted.loss(batch).total, loss)


BACKENDS: tuple[Any, ...] = ("native", "torch")


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_take_no_positions(folder: Path, method: str, tmp_path: Path) -> None:
    """Our text begins at position 0; peft's behind the virtual tokens, unless told otherwise."""
    adapted, base = made(folder, tmp_path, AdapterConfig(method=method, virtual_tokens=3))
    wanted = logits(adapted)
    adapter = open_adapter(tmp_path, base)
    assert adapter.text_start == 0
    torch.testing.assert_close(
        logits(attach_saved(OPT.from_checkpoint(folder), adapter)), wanted, **EXACT
    )
    if method == "prefix":  # peft adds the number of virtual tokens to positions it is given
        theirs = PeftModel.from_pretrained(hf(folder), tmp_path)
        positions = torch.arange(len(TEXT))[None] - 3
        mask = torch.ones(1, len(TEXT))
        got = hf_logits(theirs, position_ids=positions, attention_mask=mask)
        torch.testing.assert_close(got, wanted, **EXACT)
    whole = [2, *range(4, 4 + base.config.max_position_embeddings - 1)]
    assert torch.isfinite(logits(adapted, whole)).all()
    expected = logits(adapted, whole).log_softmax(1)[:-1].gather(1, torch.tensor(whole)[1:, None])
    for backend in BACKENDS:
        (scored,) = LLM(folder, backend=backend, adapter=tmp_path).score([whole])
        np.testing.assert_allclose(scored.logprobs[1:], expected[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_made_by_peft(folder: Path, method: str, tmp_path: Path) -> None:
    """Trained with the text behind them, they are used with the text behind them."""
    base = open_checkpoint(folder)
    torch.manual_seed(2)
    kind, more = PrefixTuningConfig, {}
    if method == "prompt":
        kind, more = PromptTuningConfig, {"token_dim": base.config.embed_dim}
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **more)
    theirs = get_peft_model(hf(folder), config).eval()
    wanted = hf_logits(theirs, attention_mask=torch.ones(1, len(TEXT)))
    theirs.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path, base)
    assert adapter.text_start == 4
    torch.testing.assert_close(
        logits(attach_saved(OPT.from_checkpoint(folder), adapter)), wanted, rtol=0, atol=1e-4
    )
    expected = wanted.log_softmax(1)[:-1].gather(1, torch.tensor(TEXT)[1:, None])
    for backend in BACKENDS:
        llm = LLM(folder, backend=backend, adapter=tmp_path)
        assert llm.config.max_position_embeddings == base.config.max_position_embeddings - 4
        (scored,) = llm.score([TEXT])
        np.testing.assert_allclose(scored.logprobs[1:], expected[:, 0].numpy(), atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_engines_merge_when_they_load(folder: Path, backend: Any, tmp_path: Path) -> None:
    adapted, _ = made(folder, tmp_path, AdapterConfig(rank=3, dora=True, target_modules=EVERY))
    llm = LLM(folder, backend=backend, device="cpu", adapter=tmp_path)
    (scored,) = llm.score([TEXT])
    expected = logits(adapted).log_softmax(1)[:-1].gather(1, torch.tensor(TEXT)[1:, None])
    np.testing.assert_allclose(scored.logprobs[1:], expected[:, 0].numpy(), atol=2e-4)
