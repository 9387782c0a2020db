"""A corpus, a recipe and a model small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_runs import place, two
from tiny_corpus import story, write_corpus

from optlm.train.pretrain.recipe import PretrainConfig

__all__ = ["place", "two"]  # fixtures


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Settings of a two-layer model on two parts, as parsed JSON."""
    tales = [{"text": story(i), "source": "tales: a"} for i in range(60)]
    notes = [{"text": f"Note {i}: " + story(i * 3), "source": "notes"} for i in range(40)]
    train = write_corpus(tmp_path / "train.jsonl.zst", [*tales, *notes])
    valid = write_corpus(tmp_path / "valid.jsonl", [{"text": story(i)} for i in range(100, 106)])
    return {
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "ffn_dim": 64,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
        "data": {
            "parts": [
                {"name": "tales", "file": str(train), "weight": 3, "sources": ["tales"]},
                {"name": "notes", "file": str(train), "weight": 1, "sources": ["notes"]},
            ],
            "validation": {"stories": str(valid)},
            "vocab_size": 300,
        },
        "loop": {
            "steps": 12,
            "log_every": 2,
            "evaluate_every": 6,
            "checkpoint_every": 3,
            "optim": {"learning_rate": 0.003, "warmup_steps": 2},
        },
        "batch_tokens": 128,
        "micro_batch_tokens": 128,
        "sequence_lengths": {"16": 1, "32": 1},
        "prompts": ["the cat"],
        "seed": 3,
    }


@pytest.fixture
def config(recipe: dict[str, Any]) -> PretrainConfig:
    return PretrainConfig.from_dict(recipe)
