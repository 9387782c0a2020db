"""An `OPTConfig` from the training settings that metaseq keeps beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.pickleobjects import Opaque
from optlm.checkpoint.tensor import Tensor
from optlm.config import OPTConfig

_FIELDS = {
    "decoder_embed_dim": "hidden_size",
    "decoder_layers": "num_hidden_layers",
    "decoder_ffn_embed_dim": "ffn_dim",
    "decoder_attention_heads": "num_attention_heads",
    "decoder_input_dim": "word_embed_proj_dim",
    "decoder_normalize_before": "do_layer_norm_before",
    "share_decoder_input_output_embed": "tie_word_embeddings",
    "activation_fn": "activation_function",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
}
_REQUIRED = (
    "decoder_embed_dim",
    "decoder_layers",
    "decoder_ffn_embed_dim",
    "decoder_attention_heads",
)
_POSITION_ROWS = 2  # more than positions


def config_from_settings(settings: object, tensors: Mapping[str, Tensor], where: str) -> OPTConfig:
    """Build the configuration; vocabulary and context come from the shapes of the embeddings.

    Raises:
        CheckpointError: the settings or embeddings that are needed are not there.
        ConfigError: the settings describe no OPT.
    """
    model = _member(settings, "model")
    source = model if model is not None else settings
    missing = [name for name in _REQUIRED if _member(source, name) is None]
    if missing:
        raise fault_error(
            "config-missing",
            where,
            f"has no config.json beside it, and its settings lack {', '.join(missing)}; "
            "write a config.json of the model's size next to the weights",
        )
    values: dict[str, Any] = {
        ours: value
        for theirs, ours in _FIELDS.items()
        if (value := _member(source, theirs)) is not None
    }
    values["vocab_size"] = _rows(tensors, "embed_tokens.weight", where)
    positions = _rows(tensors, "embed_positions.weight", where)
    values["max_position_embeddings"] = positions - _POSITION_ROWS
    values["enable_bias"] = not _member(source, "disable_bias")
    values["layer_norm_elementwise_affine"] = not _member(source, "disable_affine_ln")
    values["scale_embeddings"] = _member(source, "no_scale_embedding") is False
    return OPTConfig.from_dict(values)


def _rows(tensors: Mapping[str, Tensor], ending: str, where: str) -> int:
    for name, tensor in tensors.items():
        if name.endswith(ending) and len(tensor.shape) == 2:
            return tensor.shape[0]
    raise fault_error("missing-tensor", where, f"holds no {ending}")


def _member(settings: object, name: str) -> Any:
    """One setting of a dict, an argparse namespace or an omegaconf node, all as inert data."""
    if isinstance(settings, Opaque):
        settings = settings.state
        if isinstance(settings, dict) and "_content" in settings:
            settings = settings["_content"]
    value = settings.get(name) if isinstance(settings, dict) else None
    if isinstance(value, Opaque) and isinstance(value.state, dict) and "_val" in value.state:
        value = value.state["_val"]
    if isinstance(value, str):
        return value[:100]
    return value if isinstance(value, (int, float, Opaque, dict)) else None
