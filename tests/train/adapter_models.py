"""Tiny models with adapters, ours and peft's, and their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import OPTForCausalLM

from optlm.checkpoint import Checkpoint, open_checkpoint
from optlm.checkpoint.fingerprint import fingerprint
from optlm.model import OPT
from optlm.train.finetune.adapters import Adapted, AdapterConfig, attach, save_adapter
from optlm.train.finetune.examples import Example
from optlm.train.finetune.packing import Rows, make_rows

TEXT = [2, 17, 9, 250, 33, 8, 8, 101, 42]
EVERY = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "embed_tokens", "lm_head")
EXACT = {"rtol": 1e-5, "atol": 1e-5}  # of logits up to about 20


def targets(config: Any, names: tuple[str, ...] = EVERY) -> tuple[str, ...]:
    return (*names, "project_in", "project_out") if config.has_projections else names


def rows(*texts: list[int]) -> Rows:
    return make_rows([[Example(text)] for text in texts], pad=1)


def logits(adapted: Adapted, text: list[int] = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return adapted.logits(adapted.hidden(rows([*text, 2])))[0]


def disturb(adapted: Adapted) -> Adapted:
    """Trained-looking numbers in place of those an adapter begins with."""
    torch.manual_seed(7)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            weight.data += 0.2 * torch.randn_like(weight)
    return adapted.eval()


def made(folder: Path, out: Path, config: AdapterConfig) -> tuple[Adapted, Checkpoint]:
    """An adapter of ours with random numbers, written to `out`."""
    base = open_checkpoint(folder)
    adapted = disturb(attach(OPT.from_checkpoint(folder), config, torch.tensor([5, 9, 11])))
    digests = fingerprint(base.config, base.tensors)
    save_adapter(out, adapted, config, base_fingerprint=digests, base_name=str(folder))
    return adapted, base


def hf(folder: Path) -> OPTForCausalLM:
    return OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logits(model: Any, text: list[int] = TEXT, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), **options).logits[0, -len(text) :]


def merged_logits(merged: Checkpoint) -> torch.Tensor:
    model = OPT(merged.config)
    model.load_state_dict({n: torch.from_numpy(t.numpy()) for n, t in merged.tensors.items()})
    return logits(Adapted(model.eval(), method="full"))
