"""The reference OPT in PyTorch: one forward pass for every variant, in reading order.

Parameter names are Hugging Face's, so `OPT(config).state_dict()` has exactly the keys and shapes of
`config.parameter_shapes()`. This file defines what the model computes; the native engine is tested
against it.

Shapes: B sequences, T new tokens, S all tokens (cached and new), D hidden size, E embedding width,
H heads, K head width, F feed-forward width, V vocabulary.

Hook points are identity modules: a forward hook on one sees the value and may return another.
Unless a hook does, the numbers are those of a pass without hooks, bit by bit. The table of all
points is in docs/interpretability.md, and `optlm.interpret.points` holds it as data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optlm.checkpoint import open_checkpoint
from optlm.config import POSITION_OFFSET, OPTConfig
from optlm.errors import ConfigError, ContextLengthError, RequestError, did_you_mean

__all__ = ["OPT", "IGNORE", "KVCache", "OPTOutput", "hooked"]

IGNORE = -100  # a label that does not count

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,  # exact, with erf
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens read so far, per layer (B, H, S, K); never changed in place."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Tokens held, padding included."""
        return self.keys[0].shape[2]


@dataclass(frozen=True, kw_only=True)
class OPTOutput:
    """What one forward pass gives.

    `hidden_states` are L + 1 tensors: what enters each layer, then what the head reads (after the
    last norm and project_out). `attentions` are L tensors (B, H, T, S). In training with layerdrop
    the layers that were left out have no entry in `attentions` and `cache`.
    """

    logits: Tensor  # (B, T, V)
    cache: KVCache
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HookPoint(nn.Identity):
    """A named value of the forward pass; see the table at the top."""


def _hooks(count: int) -> list[HookPoint]:
    return [HookPoint() for _ in range(count)]


class Attention(nn.Module):
    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        d, bias = config.hidden_size, config.enable_bias
        self.k_proj = nn.Linear(d, d, bias=bias)
        self.v_proj = nn.Linear(d, d, bias=bias)
        self.q_proj = nn.Linear(d, d, bias=bias)
        self.out_proj = nn.Linear(d, d, bias=bias)
        self.hook_in, self.hook_q, self.hook_k, self.hook_v = _hooks(4)
        self.hook_probs, self.hook_heads = _hooks(2)
        self.heads = config.num_attention_heads
        self.scale = config.head_dim**-0.5
        self.dropout = config.attention_dropout

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None, want_probs: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        """Attend from x (B, T, D); `mask` (B, 1, T, S) is True where a token may look.

        No mask means plain causal attention without `past`. Returns what to add to the residual,
        the keys and values of all S tokens, and the probabilities if they were formed. The fused
        kernel mixes the values unless a hook returned other probabilities (a clone will do), which
        are then used as they are.
        """
        x = self.hook_in(x)
        q = self.hook_q(self._split(self.q_proj(x) * self.scale))  # scaled after the bias
        k = self.hook_k(self._split(self.k_proj(x)))
        v = self.hook_v(self._split(self.v_proj(x)))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        dropout = self.dropout if self.training else 0.0
        formed: Tensor | None = None
        probs: Tensor | None = None
        if want_probs or self.hook_probs._forward_hooks:
            formed = self._probs(q, k, mask)
            probs = self.hook_probs(formed)
        if probs is None or probs is formed:  # only watched, if at all
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=1.0
            )
        else:
            mixed = F.dropout(probs, dropout) @ v
        heads = self.hook_heads(mixed.transpose(1, 2))
        return self.out_proj(heads.flatten(2)), (k, v), probs

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, H, T, K)

    def _probs(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(2, 3)
        if mask is None:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)


class Layer(nn.Module):
    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.ffn_dim, config.enable_bias
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = _norm(config)
        self.fc1 = nn.Linear(d, f, bias=bias)
        self.fc2 = nn.Linear(f, d, bias=bias)
        self.final_layer_norm = _norm(config)  # the feed-forward block's, before or after it
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = _hooks(3)
        self.hook_attn_out, self.hook_ffn_in, self.hook_ffn_pre = _hooks(3)
        self.hook_ffn_act, self.hook_ffn_out = _hooks(2)
        self.activation = _ACTIVATIONS[config.activation_function]
        self.norm_before = config.do_layer_norm_before
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, mask: Tensor | None, past: tuple[Tensor, Tensor] | None, want_probs: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
        x = self.hook_resid_pre(x)
        h = self.self_attn_layer_norm(x) if self.norm_before else x
        h, cache, probs = self.self_attn(h, mask, past, want_probs)
        x = x + self.hook_attn_out(F.dropout(h, self.dropout, self.training))
        x = x if self.norm_before else self.self_attn_layer_norm(x)
        x = self.hook_resid_mid(x)
        h = self.hook_ffn_in(self.final_layer_norm(x) if self.norm_before else x)
        h = self.hook_ffn_act(self.activation(self.hook_ffn_pre(self.fc1(h))))
        x = x + self.hook_ffn_out(F.dropout(self.fc2(h), self.dropout, self.training))
        x = x if self.norm_before else self.final_layer_norm(x)
        return self.hook_resid_post(x), cache, probs


class Decoder(nn.Module):
    """Everything but the head; the modules whose names begin with ``model.decoder``."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        d, e = config.hidden_size, config.embed_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, e)
        self.embed_positions = nn.Embedding(config.max_position_embeddings + POSITION_OFFSET, d)
        self.project_in = nn.Linear(e, d, bias=False) if config.has_projections else None
        self.project_out = nn.Linear(d, e, bias=False) if config.has_projections else None
        self.final_layer_norm = _norm(config) if config.has_final_layer_norm else None
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.hook_embed, self.hook_pos_embed, self.hook_final = _hooks(3)
        self.layerdrop = config.layerdrop

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, T) tokens and 0-based positions to (B, T, D); the embedding itself has no dropout."""
        x = self.embed_tokens(input_ids)
        x = x if self.project_in is None else self.project_in(x)
        positions = self.embed_positions(position_ids + POSITION_OFFSET)
        total: Tensor = self.hook_embed(x) + self.hook_pos_embed(positions)
        return total

    def finish(self, x: Tensor) -> Tensor:
        """(B, T, D) from the last layer to (B, T, E) for the head."""
        x = x if self.final_layer_norm is None else self.final_layer_norm(x)
        x = x if self.project_out is None else self.project_out(x)
        final: Tensor = self.hook_final(x)
        return final


class OPT(nn.Module):
    """A decoder-only transformer of the OPT family with its language-model head."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"decoder": Decoder(config)})
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        self.reset_parameters()

    @classmethod
    def from_checkpoint(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> OPT:
        """Load a folder or hub name of any layout, in evaluation mode.

        Raises:
            CheckpointError: missing, damaged or ill-fitting files.
            ConfigError: a configuration that is no OPT.
        """
        checkpoint = open_checkpoint(source)
        with torch.device("meta"):
            model = cls(checkpoint.config)
        state = {
            name: torch.from_numpy(tensor.numpy()).to(dtype)
            for name, tensor in checkpoint.tensors.items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    @property
    def decoder(self) -> Decoder:
        decoder = self.model["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder

    @property
    def head_weight(self) -> Tensor:
        """(V, E): the token embedding, unless the head is its own matrix."""
        tied = self.config.tie_word_embeddings
        return self.decoder.embed_tokens.weight if tied else self.lm_head.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights: normal, biases 0, norms 1; what writes to the residual is smaller.

        Source: OPT paper (arXiv 2205.01068), section 2.2; the deviation is `config.init_std`.
        """
        deep = self.config.init_std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                to_residual = name.endswith(("out_proj.weight", "fc2.weight"))
                weight.normal_(0.0, deep if to_residual else self.config.init_std)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """(B, T) unpadded tokens to what the head reads (B, T, E): the short way for training."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.decoder.embed(input_ids, positions)
        for layer in self.decoder.layers:
            if not self._drop_layer():
                x = layer(x, None, None, False)[0]
        return self.decoder.finish(x)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past: KVCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> OPTOutput:
        """Run `input_ids` (B, T) after the tokens in `past`.

        Args:
            attention_mask: (B, S), 1 for real tokens and 0 for padding left or right, cached tokens
                included.
            position_ids: (B, T) 0-based; by default the number of real tokens before each.
            labels: (B, T), usually `input_ids` again; position t is scored against label t + 1,
                `IGNORE` counts nothing, the loss is the mean in nats.

        Raises:
            RequestError: shapes that contradict each other, or ids outside the vocabulary.
            ContextLengthError: more tokens than the position table has rows.
        """
        _check_shapes(input_ids, attention_mask, position_ids, labels, past)
        batch, new = input_ids.shape
        total = new + (past.length if past else 0)
        if position_ids is None:
            position_ids = _positions(attention_mask, batch, total, input_ids.device)[:, -new:]
        self._check_range(input_ids, position_ids)
        mask = _allowed(attention_mask, new, total, input_ids.device)
        x = self.decoder.embed(input_ids, position_ids)
        states: list[Tensor] = []
        attentions: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for i, layer in enumerate(self.decoder.layers):
            states.append(x)
            if self._drop_layer():
                continue
            layer_past = (past.keys[i], past.values[i]) if past else None
            x, (k, v), probs = layer(x, mask, layer_past, output_attentions)
            keys.append(k)
            values.append(v)
            attentions += [] if probs is None else [probs]
        x = self.decoder.finish(x)
        logits = F.linear(x, self.head_weight)
        return OPTOutput(
            logits=logits,
            cache=KVCache(keys=tuple(keys), values=tuple(values)),
            loss=None if labels is None else _shifted_loss(logits, labels),
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _drop_layer(self) -> bool:
        """LayerDrop (arXiv 1909.11556), in training only."""
        share = self.config.layerdrop
        return self.training and share > 0 and bool(torch.rand(()) < share)

    def _check_range(self, input_ids: Tensor, position_ids: Tensor) -> None:
        longest, context = int(position_ids.max()) + 1, self.config.max_position_embeddings
        if longest > context:
            raise ContextLengthError(f"the input has {longest} tokens; the context is {context}")
        lowest, highest = int(input_ids.min()), int(input_ids.max())
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise RequestError(f"token id {wrong} is not in 0..{self.config.vocab_size - 1}")


def _norm(config: OPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)


def _positions(mask: Tensor | None, batch: int, total: int, device: torch.device) -> Tensor:
    """(B, S): the number of real tokens before each; -1 (row 1 of the table) for padding."""
    if mask is None:
        return torch.arange(total, device=device).expand(batch, total)
    mask = mask.long()
    return mask.cumsum(dim=1) * mask - 1


def _allowed(mask: Tensor | None, new: int, total: int, device: torch.device) -> Tensor | None:
    """(B, 1, T, S), True where a new token may look; None when that is plain causal attention."""
    if mask is None and new == total:
        return None
    causal = torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)
    if mask is None:
        return causal[None, None]
    itself = torch.eye(total, dtype=torch.bool, device=device)[total - new :]  # no row is all False
    return causal & mask.bool()[:, None, None, :] | itself


def _check_shapes(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    labels: Tensor | None,
    past: KVCache | None,
) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise RequestError(f"input_ids must be (B, T) and not empty, not {tuple(input_ids.shape)}")
    batch, new = input_ids.shape
    whole = (batch, new + (past.length if past else 0))
    for name, given, wanted in (
        ("attention_mask", attention_mask, whole),
        ("position_ids", position_ids, (batch, new)),
        ("labels", labels, (batch, new)),
    ):
        if given is not None and given.shape != wanted:
            raise RequestError(f"{name} has shape {tuple(given.shape)}; these inputs need {wanted}")


def _shifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
    )


@contextmanager
def hooked(model: OPT, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[OPT]:
    """Attach functions to hook points by name while the block runs; a returned tensor replaces.

    Functions must not change the value that they are given in place.

    Raises:
        ConfigError: no hook point has that name.
    """
    points = {name: m for name, m in model.decoder.named_modules() if isinstance(m, HookPoint)}
    with ExitStack() as stack:
        for name, function in hooks.items():
            if name not in points:
                raise ConfigError(f"no hook point {name!r}{did_you_mean(name, points)}")
            handle = points[name].register_forward_hook(lambda _m, _i, out, f=function: f(out))
            stack.callback(handle.remove)
        yield model
