"""How good a model is while it trains: bits per byte of held-out text, and samples to read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from optlm.model import OPT
from optlm.train.loop.device import autocast
from optlm.train.loop.loss import head_cross_entropy
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.tokens.corpus import CorpusError, ReadReport, read_documents
from optlm.train.tokens.packed import encode_documents

__all__ = ["Validation", "bits_per_byte", "sample"]

_SAMPLE_TOKENS = 120


class Validation:
    """Reads the held-out text once; called with a model, gives figures for the log.

    Raises:
        CorpusError: a validation file is missing, damaged or without a usable document.
    """

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._domains: dict[str, tuple[list[list[int]], int]] = {}
        for domain, file in config.data.validation.items():
            report = ReadReport()
            texts = read_documents(Path(file), report, max_bytes=config.validation_bytes)
            documents = list(encode_documents(tokenizer, texts))
            if not documents:
                raise CorpusError(
                    f"validation domain {domain!r}: {file} has no document within "
                    f"validation_bytes {config.validation_bytes} ({report.broken} broken lines)"
                )
            self._domains[domain] = (documents, report.text_bytes)

    def __call__(self, model: OPT) -> dict[str, Any]:
        """``bits_per_byte`` by domain, their mean as ``score`` if there is any, ``samples``."""
        with autocast(self._config.precision, model.decoder.embed_tokens.weight.device):
            bits = {
                domain: round(bits_per_byte(model, documents, size), 4)
                for domain, (documents, size) in self._domains.items()
            }
            samples = [self._continue(model, prompt) for prompt in self._config.prompts]
        score = {"score": sum(bits.values()) / len(bits)} if bits else {}
        return {**score, "bits_per_byte": bits, "samples": samples}

    def _continue(self, model: OPT, prompt: str) -> str:
        ids = self._tokenizer.encode(prompt).ids
        text: str = self._tokenizer.decode(
            sample(model, ids, count=_SAMPLE_TOKENS, seed=self._config.seed)
        )
        return text


@torch.no_grad()
def bits_per_byte(model: OPT, documents: list[list[int]], text_bytes: int) -> float:
    """Bits the model needs for a byte of text.

    Args:
        documents: token ids, each beginning with ``</s>``; longer ones are read in windows of the
            context that share one token, so every token but the first is predicted exactly once.
        text_bytes: UTF-8 size of all documents.
    """
    context = model.config.max_position_embeddings
    nats = 0.0
    for ids in documents:
        for begin in range(0, len(ids) - 1, context):
            window = torch.tensor([ids[begin : begin + context + 1]])
            hidden = model.hidden(window[:, :-1])[0]
            nats += float(head_cross_entropy(hidden, model.head_weight, window[0, 1:]))
    return nats / math.log(2) / max(1, text_bytes)


@torch.no_grad()
def sample(
    model: OPT, ids: list[int], *, count: int, seed: int, temperature: float = 0.8, top_k: int = 40
) -> list[int]:
    """Continue `ids` by at most `count` tokens, or until ``</s>``.

    Uses a generator of its own, so that looking at samples changes nothing in the training.
    """
    random = torch.Generator().manual_seed(seed)
    tokens, past, new = list(ids), None, torch.tensor([ids])
    top_k = min(top_k, model.config.vocab_size)
    for _ in range(min(count, model.config.max_position_embeddings - len(ids))):
        output = model(new, past=past)
        logits, order = (output.logits[0, -1].float() / temperature).topk(top_k)
        token = int(order[torch.multinomial(logits.softmax(0).cpu(), 1, generator=random)])
        tokens.append(token)
        if token == model.config.eos_token_id:
            break
        past, new = output.cache, torch.tensor([[token]])
    return tokens
