"""Show what a model is and what it needs."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from optlm.cli.common import add_json_option

if TYPE_CHECKING:
    from optlm.checkpoint import Checkpoint
    from optlm.config import OPTConfig

USAGE = "[MODEL] [--json]"

_FORMATS = ("f32", "bf16", "int8", "int4")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="folder, hub name, or published size such as 6.7b (default: the bundled model)",
    )
    add_json_option(parser)


def run(options: Namespace) -> None:
    card = _published(options.model) or _checkpoint(options.model)
    if options.json:
        print(json.dumps(card))
        return
    for name, value in card.items():
        print(f"{name.replace('_', ' '):<20}{_shown(name, value)}")


def _published(model: str | None) -> dict[str, Any] | None:
    from optlm.config import PUBLISHED

    size = PUBLISHED.get((model or "").lower().removeprefix("opt-"))
    if size is None:
        return None
    return {
        "model": f"OPT-{str(model).upper().removeprefix('OPT-')} as published",
        **_numbers(size.config),
        "learning_rate": size.learning_rate,
        "batch_tokens": size.batch_tokens,
    }


def _checkpoint(model: str | None) -> dict[str, Any]:
    from optlm.assets import bundled_model
    from optlm.checkpoint import open_checkpoint
    from optlm.errors import TokenizerError
    from optlm.tokenizer import Tokenizer

    checkpoint = open_checkpoint(bundled_model() if model is None else model)
    try:
        vocabulary = Tokenizer.from_folder(checkpoint.folder, checkpoint.config)
        tokenizer = f"{vocabulary.vocab_size} entries, start token {vocabulary.bos_id}"
    except TokenizerError as error:
        tokenizer = f"none that can be used: {error}"
    return {
        "model": "bundled" if model is None else model,
        "folder": str(checkpoint.folder),
        "files": f"{checkpoint.layout}, {_stored(checkpoint)}",
        "tokenizer": tokenizer,
        **_numbers(checkpoint.config),
    }


def _stored(checkpoint: Checkpoint) -> str:
    if checkpoint.packed is not None:
        return checkpoint.packed.dtype
    return " and ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))


def _numbers(config: OPTConfig) -> dict[str, Any]:
    return {
        "variant": config.variant,
        "parameters": config.parameter_count(),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "ffn_dim": config.ffn_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "weight_bytes": {dtype: config.weight_bytes(dtype) for dtype in _FORMATS},
        "kv_bytes_per_token": {dtype: config.kv_bytes_per_token(dtype) for dtype in ("f32", "f16")},
        "flops_per_token": config.flops_per_token(config.max_position_embeddings),
    }


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_bytes(count)}" for key, count in value.items())
    if name == "flops_per_token":
        return f"{value:.3g} at full context"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
