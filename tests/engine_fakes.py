"""Stand-ins for the runner and the tokenizer that make scheduling mistakes visible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from optlm.config import OPTConfig
from optlm.engine.llm import LLM
from optlm.engine.runner import best_tokens

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Rule = Callable[[list[int]], Float32]

BLOCK = 4
EMPTY = -1


def tiny_config(vocab_size: int = 97, context: int = 64) -> OPTConfig:
    return OPTConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        num_hidden_layers=1,
        ffn_dim=8,
        num_attention_heads=1,
        max_position_embeddings=context,
    )


def hashed_logits(vocab_size: int, *, eos_bias: float = 0.0) -> Rule:
    """Logits that depend on every token of the prefix and on their order, as a model's do."""

    def rule(prefix: list[int]) -> Float32:
        seed = hash(tuple(prefix)) & 0x7FFFFFFF
        logits = np.random.default_rng(seed).normal(0, 2, vocab_size).astype(np.float32)
        logits[2] += eos_bias
        return logits

    return rule


def scripted(vocab_size: int, script: Sequence[int]) -> Rule:
    """Token `script[i]` follows a prefix of i + 1 tokens, in a circle."""

    def rule(prefix: list[int]) -> Float32:
        logits = np.zeros(vocab_size, np.float32)
        logits[script[(len(prefix) - 1) % len(script)]] = 9.0
        return logits

    return rule


class FakeRunner:
    """A `Runner` whose KV cache holds the tokens themselves.

    A token's logits are made from the prefix found in the cache, so a wrong block table, a block
    given away too early or a position never computed changes the output or fails at once.
    """

    def __init__(
        self,
        rule: Rule,
        config: OPTConfig | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = BLOCK,
        max_batch_tokens: int = 16,
    ) -> None:
        self.config = config or tiny_config()
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.cache = np.full((num_blocks, block_size), EMPTY, np.int32)
        self.batches: list[tuple[int, int]] = []  # (tokens, logit rows) of every call
        self._rule = rule

    def forward(
        self,
        tokens: Int32,
        positions: Int32,
        seq_starts: Int32,
        block_tables: Int32,
        logit_rows: Int32,
        adapters: Int32 | None = None,
    ) -> Float32:
        self._check(tokens, positions, seq_starts, block_tables, logit_rows)
        wanted = set(logit_rows.tolist())
        rows = []
        for b, table in enumerate(block_tables):
            for t in range(seq_starts[b], seq_starts[b + 1]):
                position = positions[t]
                slot = (table[position // self.block_size], position % self.block_size)
                self.cache[slot] = tokens[t]
                if t in wanted:
                    rows.append(self._rule(self._prefix(table, position)))
        self.batches.append((len(tokens), len(rows)))
        return np.stack(rows) if rows else np.zeros((0, self.config.vocab_size), np.float32)

    def forward_best(
        self,
        tokens: Int32,
        positions: Int32,
        seq_starts: Int32,
        block_tables: Int32,
        logit_rows: Int32,
        adapters: Int32 | None = None,
    ) -> Int32:
        return best_tokens(self.forward(tokens, positions, seq_starts, block_tables, logit_rows))

    def forward_hidden(
        self,
        tokens: Int32,
        positions: Int32,
        seq_starts: Int32,
        block_tables: Int32,
        logit_rows: Int32,
        adapters: Int32 | None = None,
    ) -> tuple[Float32, Float32]:
        """Hidden vectors are random directions, one per token and its predecessor."""
        logits = self.forward(tokens, positions, seq_starts, block_tables, logit_rows)
        hidden = []
        for b, table in enumerate(block_tables):
            for t in range(seq_starts[b], seq_starts[b + 1]):
                hidden.append(hidden_vector(self._prefix(table, positions[t])))
        return logits, np.stack(hidden)

    def copy_blocks(self, source: Int32, target: Int32) -> None:
        assert not set(source.tolist()) & set(target.tolist())
        self.cache[target] = self.cache[source]

    def _prefix(self, table: Int32, position: int) -> list[int]:
        blocks = table[: position // self.block_size + 1]
        prefix: list[int] = self.cache[blocks].ravel()[: position + 1].tolist()
        assert EMPTY not in prefix, "a token attends to positions that were never computed"
        return prefix

    def _check(
        self, tokens: Int32, positions: Int32, starts: Int32, tables: Int32, rows: Int32
    ) -> None:
        assert 1 <= len(tokens) <= self.max_batch_tokens
        assert len(positions) == len(tokens) == starts[-1]
        assert starts[0] == 0
        assert len(tables) == len(starts) - 1
        assert np.all(np.diff(starts) > 0)
        assert np.all(np.diff(rows) > 0)
        assert all(
            array.dtype == np.int32 and array.flags.c_contiguous
            for array in (tokens, positions, starts, tables, rows)
        )
        written = []
        for b, table in enumerate(tables):
            places = positions[starts[b] : starts[b + 1]]
            assert np.all(np.diff(places) == 1)
            written += [(table[p // self.block_size], p % self.block_size) for p in places]
        assert len(set(written)) == len(written), "two tokens of a step share a slot"


def hidden_vector(prefix: Sequence[int]) -> Float32:
    seed = hash(tuple(prefix[-2:])) & 0x7FFFFFFF
    return np.random.default_rng(seed).normal(0, 1, 6).astype(np.float32) + 0.5


class ByteTokenizer:
    """Id 3 + b is byte b; 2 is ``</s>``, which `encode` puts first and `decode` leaves out."""

    def encode(self, text: str, /) -> list[int]:
        return [2, *(byte + 3 for byte in text.encode())]

    def decode(self, ids: Iterable[int], /) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode("utf-8", "replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()


class ByteDecoder:
    def __init__(self) -> None:
        self._pending = b""

    def push(self, token_id: int, /) -> str:
        if 3 <= token_id < 259:
            self._pending += bytes([token_id - 3])
        for length in range(len(self._pending), -1, -1):
            try:
                text = self._pending[:length].decode()
            except UnicodeDecodeError:
                continue
            if len(self._pending) - length <= 3:
                self._pending = self._pending[length:]
                return text
        text = self._pending.decode("utf-8", "replace")
        self._pending = b""
        return text

    def finish(self) -> str:
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text


def text_llm(text: str, **options: int) -> LLM:
    """An engine that answers the empty prompt with `text`, then ``</s>``."""
    script = [*ByteTokenizer().encode(text)[1:], 2]
    config = tiny_config(300, 256)
    return LLM.from_runner(FakeRunner(scripted(300, script), config, **options), ByteTokenizer())
