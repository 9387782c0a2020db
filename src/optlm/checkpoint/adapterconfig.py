"""Reading peft's ``adapter_config.json``: what is understood is checked, all else is refused."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.jsonfile import read_object
from optlm.errors import CheckpointError

__all__ = ["ADAPTER_CONFIG", "MAX_RANK", "AdapterSettings", "read_adapter_config"]

ADAPTER_CONFIG = "adapter_config.json"
MAX_RANK = 16_384  # above the width of OPT-175B
MAX_VIRTUAL_TOKENS = 65_536
_LIMIT = 2**20  # bytes
_KINDS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")

# Ways to begin a training that leave the base as it is. Others ("pissa", "olora", "loftq" ...) move
# part of the base's weights into the adapter, which then fits only what is left of the base.
_HARMLESS_INIT = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys that say how an adapter was trained, or that the names of its tensors say again.
_TOLD_ELSEWHERE = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "encoder_hidden_size", "eva_config",
    "exclude_modules", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "prompt_tuning_init", "prompt_tuning_init_text", "qalora_group_size", "rank_pattern",
    "revision", "runtime_config", "task_type", "tokenizer_kwargs", "tokenizer_name_or_path",
    "ensure_weight_tying",
))  # fmt: skip
_READ = frozenset((
    "alpha_pattern", "init_lora_weights", "lora_alpha", "num_attention_heads", "num_layers",
    "num_transformer_submodules", "num_virtual_tokens", "peft_type", "r", "target_modules",
    "token_dim", "use_dora", "use_rslora",
))  # fmt: skip
_NARROWING = ("exclude_modules", "layers_pattern", "layers_to_transform")
_NEUTRAL = {"bias": "none"}  # all other keys: null, false or empty


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What an ``adapter_config.json`` says."""

    kind: str  # "lora", "prefix" or "prompt"
    alpha: float = 1.0
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # by end of the module's name
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = ()  # ends of module names; empty: told by a pattern
    all_layers: bool = True  # false: only some of the modules that `targets` name
    virtual_tokens: int = 0
    heads: int | None = None  # None: not told

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied by: alpha / r, with rsLoRA (arXiv 2312.03732) alpha / sqrt(r)."""
        alpha = self.alpha
        for end, value in self.alpha_pattern.items():
            if module == end or module.endswith("." + end):
                alpha = value
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(folder: Path) -> AdapterSettings:
    """The settings in a folder's ``adapter_config.json``.

    Raises:
        CheckpointError: it is missing, no JSON object, of an unknown kind, or asks for something
            that would change the numbers and is not understood.
    """
    path = folder / ADAPTER_CONFIG
    try:
        values = read_object(path, _LIMIT, "adapter-config")
    except CheckpointError as error:
        if error.faults and error.faults[0].code == "missing-file":
            message = "does not exist; is this the folder of an adapter, and was it fully written?"
            raise fault_error("adapter-config", path, message) from None
        raise
    kind = _KINDS.get(str(values.get("peft_type")))
    if kind is None:
        raise fault_error(
            "adapter-kind",
            path,
            f"peft_type is {values.get('peft_type')!r}; optlm reads {', '.join(_KINDS)}",
        )
    _refuse_unknown(path, values)
    return _lora(path, values) if kind == "lora" else _virtual(path, values, kind)


def _refuse_unknown(path: Path, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _TOLD_ELSEWHERE or key in _READ or value == _NEUTRAL.get(key, False):
            continue
        if value not in (None, [], {}):
            raise fault_error(
                "adapter-unsupported",
                path,
                f"{key} is {value!r:.80}, which would change the numbers and is not supported",
            )
    if values.get("init_lora_weights", True) not in _HARMLESS_INIT:
        raise fault_error(
            "adapter-unsupported",
            path,
            f"init_lora_weights is {values['init_lora_weights']!r:.80}: the adapter fits a base "
            "whose weights were changed first; save it with peft's path_initial_model_for_weight_"
            "conversion to make it an ordinary LoRA",
        )


def _lora(path: Path, values: dict[str, Any]) -> AdapterSettings:
    rank = _number(path, "r", values.get("r", 8), 1, MAX_RANK, whole=True)
    pattern = values.get("alpha_pattern") or {}
    targets = values.get("target_modules") or ()
    if not isinstance(pattern, dict) or not all(_PLAIN_NAME.fullmatch(str(k)) for k in pattern):
        raise fault_error("adapter-config", path, "alpha_pattern must map plain names to numbers")
    return AdapterSettings(
        kind="lora",
        alpha=_number(path, "lora_alpha", values.get("lora_alpha", rank), 1e-9, 1e6),
        alpha_pattern={
            key: _number(path, f"alpha_pattern[{key!r}]", value, 1e-9, 1e6)
            for key, value in pattern.items()
        },
        rslora=_flag(path, "use_rslora", values),
        dora=_flag(path, "use_dora", values),
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        all_layers=not any(values.get(key) not in (None, []) for key in _NARROWING),
    )


def _virtual(path: Path, values: dict[str, Any], kind: str) -> AdapterSettings:
    count = values.get("num_virtual_tokens")
    submodules = values.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise fault_error(
            "adapter-unsupported", path, f"num_transformer_submodules is {submodules!r}, not 1"
        )
    heads = values.get("num_attention_heads")
    if heads is not None:
        heads = int(_number(path, "num_attention_heads", heads, 1, 2**16, whole=True))
    return AdapterSettings(
        kind=kind,
        virtual_tokens=int(
            _number(path, "num_virtual_tokens", count, 1, MAX_VIRTUAL_TOKENS, whole=True)
        ),
        heads=heads,
    )


def _flag(path: Path, name: str, values: dict[str, Any]) -> bool:
    value = values.get(name) or False
    if not isinstance(value, bool):
        raise fault_error("adapter-config", path, f"{name} is {value!r:.80}, not true or false")
    return value


def _number(
    path: Path, name: str, value: object, low: float, high: float, *, whole: bool = False
) -> float:
    right = isinstance(value, int) or (isinstance(value, float) and not whole)
    if isinstance(value, bool) or not right or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise fault_error(
            "adapter-config", path, f"{name} is {value!r:.80}; it must be {kind} in {low}..{high}"
        )
    return value  # type: ignore[return-value]
