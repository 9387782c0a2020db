"""The `Runner` on PyTorch: the reference model's own layers over a paged KV cache, on CPU or GPU.

For machines without the compiled core, for GPUs, and as the native runner's twin in tests.
Sequences that decode one token run as one padded batch; a chunk of a prompt runs alone.

Letters: T new tokens, B sequences of a group, N new tokens of each, S earlier tokens (padded), n
virtual tokens, D
hidden size, H heads, K head width, E embedding width, R logit rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from optlm.checkpoint import Checkpoint
from optlm.checkpoint.adapter import Adapter
from optlm.config import OPTConfig
from optlm.engine.runner import best_tokens, changes_inside_layers
from optlm.engine.torch_lowrank import LowRankLayers
from optlm.engine.torch_prefix import Prefix, prefix_of
from optlm.errors import BackendError
from optlm.model import OPT, Layer

__all__ = ["TorchRunner"]

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class TorchRunner:
    """See `optlm.engine.runner.Runner`.

    Args:
        dtype: "f32", "f16" or "bf16", of weights, activations and KV cache; logits are float32.
        threads: PyTorch's CPU threads, process-wide; None leaves them.
        device: such as "cpu" or "cuda:0"; None takes a GPU when there is one.
        adapter: virtual tokens that stand before every text.

    Raises:
        BackendError: a dtype or device that PyTorch does not offer here.
    """

    block_size = 16

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: str,
        num_blocks: int,
        max_batch_tokens: int,
        threads: int | None = None,
        device: str | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise BackendError(
                f"the PyTorch backend has no {dtype}; use dtype='f32', 'f16' or 'bf16', "
                "or the native backend"
            )
        if threads is not None:
            torch.set_num_threads(threads)
        self.config: OPTConfig = checkpoint.config
        self.num_blocks = num_blocks
        self.max_batch_tokens = max_batch_tokens
        self._device = _device(device)
        self._model = _load(checkpoint, _DTYPES[dtype], self._device)
        self._low_rank = LowRankLayers(self._model)
        self._prefixes: dict[int, tuple[Prefix, int]] = {}  # of adapters; -1: of all without one
        if adapter is not None:
            self._prefixes[-1] = prefix_of(adapter, self._model), adapter.text_start
            context = self.config.max_position_embeddings - adapter.text_start
            self.config = dataclasses.replace(self.config, max_position_embeddings=context)
        shape = (num_blocks, self.block_size, self.config.num_attention_heads, self.config.head_dim)
        # Keys and values of each layer: (blocks, tokens of a block, H, K).
        self._keys, self._values = (
            [
                torch.zeros(shape, dtype=_DTYPES[dtype], device=self._device)
                for _ in range(self.config.num_hidden_layers)
            ]
            for _ in range(2)
        )

    def forward(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> Float32:  # fmt: skip
        hidden = self._hidden(tokens, positions, seq_starts, block_tables, adapters)
        return self._logits(hidden, logit_rows)

    def forward_best(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> Int32:  # fmt: skip
        logits = self.forward(tokens, positions, seq_starts, block_tables, logit_rows, adapters)
        return best_tokens(logits)

    def forward_hidden(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        logit_rows: Int32, adapters: Int32 | None = None,
    ) -> tuple[Float32, Float32]:  # fmt: skip
        hidden = self._hidden(tokens, positions, seq_starts, block_tables, adapters)
        return self._logits(hidden, logit_rows), hidden.float().cpu().numpy()

    def load_adapter(self, adapter: Adapter) -> int:
        adapter_id = self._low_rank.add(changes_inside_layers(adapter))
        if not adapter.mergeable:
            self._prefixes[adapter_id] = prefix_of(adapter, self._model), adapter.text_start
        return adapter_id

    def unload_adapter(self, adapter_id: int) -> None:
        self._low_rank.remove(adapter_id)
        self._prefixes.pop(adapter_id, None)

    @torch.inference_mode()
    def copy_blocks(self, source: Int32, target: Int32) -> None:
        from_, to = self._indices(source), self._indices(target)
        for cache in (*self._keys, *self._values):
            cache[to] = cache[from_]

    @torch.inference_mode()
    def _hidden(
        self, tokens: Int32, positions: Int32, seq_starts: Int32, block_tables: Int32,
        adapters: Int32 | None,
    ) -> Tensor:  # fmt: skip
        """What the head multiplies, for all tokens: (T, E)."""
        hidden: Tensor | None = None
        for adapter_id, group in _groups(np.diff(seq_starts), adapters):
            rows = np.concatenate([np.arange(seq_starts[b], seq_starts[b + 1]) for b in group])
            with self._low_rank.using(adapter_id):
                states = self._group(
                    tokens[rows].reshape(len(group), -1),
                    positions[rows].reshape(len(group), -1),
                    block_tables[group],
                    *self._prefixes.get(adapter_id, (None, 0)),
                ).flatten(0, 1)
            if hidden is None:
                hidden = states.new_empty(len(tokens), states.shape[1])
            hidden[self._indices(rows)] = states
        assert hidden is not None
        return hidden

    def _group(
        self,
        tokens: Int32,
        positions: Int32,
        tables: Int32,
        prefix: Prefix | None,
        text_start: int,
    ) -> Tensor:
        """Run sequences with equally many new tokens (B, N) through all layers; (B, N, E)."""
        size = self.block_size
        starts = positions[:, 0]
        batch, new = tokens.shape
        num_blocks = -(-int(starts.max()) // size)
        past = self._indices(tables[:, :num_blocks])  # (B, S / size)
        places = np.take_along_axis(tables, positions // size, axis=1) * size + positions % size
        slots = self._indices(places.ravel())
        before = 0 if prefix is None else prefix[0][0].shape[2]
        mask = self._mask(starts, new, num_blocks * size, before)
        decoder = self._model.decoder
        x = decoder.embed(self._indices(tokens), self._indices(positions + text_start))
        for i, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            layer = decoder.layers[i]
            assert isinstance(layer, Layer)
            earlier = _heads_first(keys[past], batch), _heads_first(values[past], batch)
            if prefix is not None:
                earlier = _after(prefix[i][0], earlier[0]), _after(prefix[i][1], earlier[1])
            x, (k, v), _ = layer(x, mask, earlier, False)
            for cache, states in ((keys, k), (values, v)):
                fresh = states[:, :, -new:].transpose(1, 2)  # (B, N, H, K)
                cache.flatten(0, 1)[slots] = fresh.flatten(0, 1)
        return decoder.finish(x)

    def _mask(self, starts: Int32, new: int, width: int, before: int) -> Tensor:
        """(B, 1, N, n + S + N): a new token sees the virtual ones, the earlier ones, itself and the
        new ones before it."""
        earlier = torch.arange(width, device=self._device) < self._indices(starts)[:, None]
        causal = torch.ones(new, new, dtype=torch.bool, device=self._device).tril()
        batch = len(starts)
        return torch.cat(
            [
                earlier.new_ones(batch, new, before),
                earlier[:, None].expand(batch, new, width),
                causal.expand(batch, new, new),
            ],
            dim=2,
        )[:, None]

    @torch.inference_mode()
    def _logits(self, hidden: Tensor, rows: Int32) -> Float32:
        wanted = hidden[self._indices(rows)]
        logits: Float32 = F.linear(wanted, self._model.head_weight).float().cpu().numpy()
        return logits

    def _indices(self, array: NDArray[np.int32] | NDArray[np.intp]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device)


def _groups(lengths: Int32, adapters: Int32 | None) -> list[tuple[int, list[int]]]:
    """Sequences that run together, with their adapter: decoding ones; a chunk of a prompt alone."""
    ids = np.full(len(lengths), -1) if adapters is None else adapters
    groups = [(int(ids[b]), [int(b)]) for b in np.flatnonzero(lengths > 1)]
    for adapter_id in np.unique(ids):
        single = np.flatnonzero((lengths == 1) & (ids == adapter_id)).tolist()
        groups += [(int(adapter_id), single)] if single else []
    return groups


def _heads_first(cached: Tensor, batch: int) -> Tensor:
    """(B, blocks, tokens, H, K) to (B, H, S, K)."""
    return cached.reshape(batch, -1, *cached.shape[-2:]).transpose(1, 2)


def _after(prefix: Tensor, states: Tensor) -> Tensor:
    """(1, H, n, K) before (B, H, S, K)."""
    return torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=2)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(f"PyTorch cannot use device {name!r} here: {reason}") from error
    return device


def _load(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> OPT:
    with torch.device("meta"):
        model = OPT(checkpoint.config)
    state = {
        name: torch.from_numpy(tensor.numpy()).to(device=device, dtype=dtype)
        for name, tensor in checkpoint.tensors.items()
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
