"""Adapters while they are trained: attached to a frozen base, and written in peft's format.

peft makes the low-rank kinds: its layers work in any module, and `OPT` has transformers' names.
Virtual tokens are ours, because they take no positions of the text (docs/adapters.md).

Letters: B rows, T tokens, V vocabulary, E embedding width, L layers, n virtual tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from optlm.checkpoint.adapter import PROMPT, SIDECAR, WEIGHTS, Adapter
from optlm.checkpoint.adapterconfig import ADAPTER_CONFIG
from optlm.checkpoint.save import atomic_file
from optlm.config import OPTConfig
from optlm.engine.torch_prefix import Prefix, run_prompt, split_prefix
from optlm.errors import ConfigError, did_you_mean
from optlm.model import IGNORE, OPT
from optlm.train.finetune.packing import Rows
from optlm.train.loop.loss import head_cross_entropy
from optlm.train.loop.trainer import Loss

__all__ = ["TARGETS", "AdapterConfig", "Adapted", "attach", "attach_saved", "save_adapter"]

METHODS = ("lora", "prefix", "prompt")
TARGETS = (
    "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2",
    "project_in", "project_out", "embed_tokens", "lm_head",
)  # fmt: skip
ALL_LINEAR = "all-linear"  # stands for the six in the layers
_NAME = "default"  # peft's name of the adapter inside the model


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is added to the base.

    Raises:
        ConfigError: values out of range, or that do not go with the method.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0  # the change is multiplied by alpha / rank, with rslora alpha / sqrt(rank)
    dropout: float = 0.0  # of what enters the low-rank change
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    dora: bool = False
    rslora: bool = False
    virtual_tokens: int = 16

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(
                f"method is {self.method!r}; it must be one of {', '.join(METHODS)}"
                f"{did_you_mean(str(self.method), METHODS)}"
            )
        for name in ("rank", "virtual_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number from 1")
        if not 1e-9 <= self.alpha <= 1e6:  # false for NaN too
            raise ConfigError(f"alpha is {self.alpha}; it must lie between 1e-9 and 1e6")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        self._spread_targets()

    def _spread_targets(self) -> None:
        names = [n for name in self.target_modules for n in _spread(name)]
        object.__setattr__(self, "target_modules", tuple(dict.fromkeys(names)))
        if not names:
            raise ConfigError(f"target_modules is empty; choose among {', '.join(TARGETS)}")
        for name in names:
            if name not in TARGETS:
                raise ConfigError(
                    f"target module {name!r} is not one of {', '.join(TARGETS)} "
                    f"(or {ALL_LINEAR}){did_you_mean(name, TARGETS)}"
                )

    def check_base(self, config: OPTConfig) -> None:
        """Check that the adapter makes sense on a model.

        Raises:
            ConfigError: a rank above that of the smallest matrix, no such module, or more virtual
                tokens than the context.
        """
        if self.method != "lora":
            context = config.max_position_embeddings
            if self.virtual_tokens >= context:
                raise ConfigError(
                    f"virtual_tokens is {self.virtual_tokens}; it must be below the context, "
                    f"{context}"
                )
            return
        for target in self.target_modules:
            if target.startswith("project_") and not config.has_projections:
                raise ConfigError(f"the model has no {target}; leave it out of target_modules")
            limit = _smallest_side(target, config)
            if self.rank > limit:
                raise ConfigError(
                    f"rank is {self.rank}; {target} has no more than {limit}, so choose a rank up "
                    "to that"
                )


def _spread(name: str) -> tuple[str, ...]:
    return TARGETS[:6] if name == ALL_LINEAR else (name,)


def _smallest_side(target: str, config: OPTConfig) -> int:
    if target in ("project_in", "project_out", "embed_tokens", "lm_head"):
        return min(config.embed_dim, config.vocab_size)
    return min(config.hidden_size, config.ffn_dim if target.startswith("fc") else 2**31)


class Adapted(nn.Module):
    """A base model with an unmerged adapter, or the base alone when all of it is trained.

    Args:
        prompt: numbers of virtual tokens as peft stores them, of the kind `method` says.
        text_start: position of the first token of the text.
    """

    def __init__(
        self, base: OPT, *, method: str, prompt: Tensor | None = None, text_start: int = 0
    ) -> None:
        super().__init__()
        self.base = base
        self.method = method
        self.text_start = text_start
        self.prompt = None if prompt is None else nn.Parameter(prompt)

    @property
    def device(self) -> torch.device:
        return self.base.head_weight.device

    def hidden(self, rows: Rows) -> Tensor:
        """What the head reads, (B, T, E)."""
        base, prefix = self.base, self._prefix()
        before = 0 if prefix is None else prefix[0][0].shape[2]
        mask = rows.mask(before)
        x = base.decoder.embed(rows.tokens, rows.positions + self.text_start)
        for i, layer in enumerate(base.decoder.layers):
            if not base._drop_layer():
                past = None if prefix is None else _widened(prefix[i], len(x))
                x = layer(x, mask, past, False)[0]
        return base.decoder.finish(x)

    def _prefix(self) -> Prefix | None:
        if self.prompt is None:
            return None
        if self.method == "prefix":
            return split_prefix(self.prompt, self.base.config)
        return run_prompt(self.base, self.prompt, positions=self.text_start > 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., E) to (..., V), through the head's own adapter if it has one."""
        if self._head_is_adapted:
            adapted: Tensor = self.base.lm_head(hidden)
            return adapted
        return F.linear(hidden, self.base.head_weight)

    def loss(self, rows: Rows) -> Loss:
        """Sum of -log p over the targets that count, in nats, and their number."""
        targets = rows.targets.flatten()
        counted = targets != IGNORE
        hidden, targets = self.hidden(rows).flatten(0, 1)[counted], targets[counted]
        if self._head_is_adapted:
            total = F.cross_entropy(self.logits(hidden).float(), targets, reduction="sum")
        else:
            total = head_cross_entropy(hidden, self.base.head_weight, targets)
        return Loss(total, len(targets))

    @property
    def _head_is_adapted(self) -> bool:
        return hasattr(getattr(self.base, "lm_head", None), "base_layer")


def _widened(states: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    keys, values = states
    return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)


# ---- attaching -----------------------------------------------------------------------------------


def attach(base: OPT, config: AdapterConfig, first_tokens: Tensor) -> Adapted:
    """A fresh adapter on `base`, whose own weights are frozen.

    A low-rank change begins as none. Virtual tokens begin as what the base makes of
    `first_tokens` (n,), some text of the kind it will see.

    Raises:
        ConfigError: see `AdapterConfig.check_base`.
    """
    config.check_base(base.config)
    base.requires_grad_(False)
    if config.method == "lora":
        alpha = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
        _inject(
            base,
            r=config.rank,
            lora_alpha=alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            use_dora=config.dora,
            use_rslora=config.rslora,
        )
        return Adapted(base, method="lora")
    with torch.no_grad():
        embeddings = base.decoder.embed_tokens(first_tokens)
        if config.method == "prompt":
            return Adapted(base, method="prompt", prompt=embeddings.clone())
        states = run_prompt(base, embeddings, positions=False)
        return Adapted(base, method="prefix", prompt=_joined(states))


def _joined(prefix: Prefix) -> Tensor:
    """The inverse of `split_prefix`."""
    states = torch.cat([state for pair in prefix for state in pair])  # (2 L, H, n, K)
    return states.permute(2, 0, 1, 3).flatten(1).contiguous()


def _inject(base: OPT, **settings: Any) -> None:
    from peft import LoraConfig
    from peft.functional import inject_adapter_in_model

    targets = settings["target_modules"]
    if base.config.tie_word_embeddings and "lm_head" in targets:
        # A head module of its own on the same weight, which peft can find and wrap.
        with torch.device("meta"):
            head = nn.Linear(base.config.embed_dim, base.config.vocab_size, bias=False)
        head.weight = base.decoder.embed_tokens.weight
        base.lm_head = head
    inject_adapter_in_model(LoraConfig(task_type="CAUSAL_LM", **settings), base, _NAME)


def attach_saved(base: OPT, adapter: Adapter) -> Adapted:
    """A stored adapter on `base`, not merged, frozen as the base is."""
    base.requires_grad_(False)
    if adapter.prompt is not None:
        numbers = torch.from_numpy(adapter.prompt.numpy())
        adapted = Adapted(
            base, method=adapter.settings.kind, prompt=numbers, text_start=adapter.text_start
        )
        return adapted.requires_grad_(False).eval()
    from peft.functional import set_peft_model_state_dict

    ranks = {module: change.a.shape[0] for module, change in adapter.matrices.items()}
    rslora = adapter.settings.rslora
    _inject(
        base,
        r=1,
        lora_alpha=1,
        target_modules=list(adapter.matrices),
        rank_pattern=ranks,
        alpha_pattern={
            module: change.scale * (math.sqrt(ranks[module]) if rslora else ranks[module])
            for module, change in adapter.matrices.items()
        },
        use_dora=adapter.settings.dora,
        use_rslora=rslora,
    )
    state = dict(_stored_state(adapter))
    result: Any = set_peft_model_state_dict(base, state, _NAME)
    assert not result.unexpected_keys, result.unexpected_keys
    return Adapted(base, method="lora").requires_grad_(False).eval()


def _stored_state(adapter: Adapter) -> list[tuple[str, Tensor]]:
    state = []
    for module, change in adapter.matrices.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if change.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        state.append((f"{module}.{a}", torch.from_numpy(change.a.numpy())))
        state.append((f"{module}.{b}", torch.from_numpy(change.b.numpy())))
        if change.magnitude is not None:
            numbers = torch.from_numpy(change.magnitude.numpy())
            state.append((f"{module}.lora_magnitude_vector", numbers))
    return state


# ---- writing -------------------------------------------------------------------------------------


def save_adapter(
    folder: Path,
    adapted: Adapted,
    config: AdapterConfig,
    *,
    base_fingerprint: Mapping[str, str],
    base_name: str | None,
) -> None:
    """Write the adapter's three files; ``adapter_config.json`` comes last.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = to_safetensors(_peft_tensors(adapted), metadata={"format": "pt"})
    sidecar = {
        "base": dict(base_fingerprint),
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    settings = _peft_settings(adapted, config, base_name)
    for name, content in (
        (WEIGHTS, data),
        (SIDECAR, _json(sidecar)),
        (ADAPTER_CONFIG, _json(settings)),
    ):
        with atomic_file(folder / name) as file:
            file.write(content)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _peft_tensors(adapted: Adapted) -> dict[str, Tensor]:
    if adapted.prompt is not None:
        return {PROMPT: adapted.prompt.detach().cpu().contiguous()}
    from peft.functional import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted.base, adapter_name=_NAME, save_embedding_layers=False)
    return {f"base_model.model.{name}": value.cpu().contiguous() for name, value in state.items()}


def _peft_settings(
    adapted: Adapted, config: AdapterConfig, base_name: str | None
) -> dict[str, Any]:
    from peft import PrefixTuningConfig, PromptTuningConfig

    if config.method == "lora":
        held: Any = adapted.base.peft_config
        settings = held[_NAME].to_dict()
    else:
        kind = PrefixTuningConfig if config.method == "prefix" else PromptTuningConfig
        shape = adapted.base.config
        width = shape.hidden_size if config.method == "prefix" else shape.embed_dim
        settings = kind(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.virtual_tokens,
            token_dim=width,
            num_transformer_submodules=1,
            num_attention_heads=shape.num_attention_heads,
            num_layers=shape.num_hidden_layers,
        ).to_dict()
        if config.method == "prefix":
            settings["encoder_hidden_size"] = width
    settings |= {"base_model_name_or_path": base_name, "inference_mode": True}
    return {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in settings.items()
    }
