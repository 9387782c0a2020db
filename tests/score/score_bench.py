"""One variant three times: our engine in float32, transformers' model, and its tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from optlm import LLM
from variants import VARIANTS, make_state, tiny_tokenizer


@dataclass(frozen=True)
class Bench:
    """One variant: `llm`, and what makes the peer on demand."""

    name: str
    folder: Path
    llm: LLM

    @functools.cached_property
    def peer(self) -> Any:
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = VARIANTS[self.name]
        peer = transformers.OPTForCausalLM(
            transformers.OPTConfig(**config.to_dict() | {"dropout": 0.0})
        )
        state = {key: torch.from_numpy(value) for key, value in make_state(config).items()}
        peer.load_state_dict(state, strict=False)
        peer.tie_weights()
        return peer.eval()

    @functools.cached_property
    def peer_tokenizer(self) -> Any:
        transformers = pytest.importorskip("transformers")
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer(VARIANTS[self.name].vocab_size),
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
        )

    def logprobs(self, token_ids: list[int]) -> NDArray[np.float64]:
        """Log-probabilities (T, V) after each token, by transformers."""
        import torch

        with torch.no_grad():
            logits = self.peer(torch.tensor([token_ids])).logits[0].double()
        result: NDArray[np.float64] = logits.log_softmax(-1).numpy()
        return result
