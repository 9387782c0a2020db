"""The OPT architecture as numbers: `OPTConfig`, the nine published sizes, exact counts.

A configuration is checked on construction, so nothing is ever allocated for a senseless one.
`OPTConfig.parameter_shapes` is the single list of what a checkpoint must hold.

Letters: V vocabulary, D hidden size, E embedding width (`word_embed_proj_dim`), F feed-forward,
L layers, S context.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optlm.errors import ConfigError, did_you_mean

__all__ = ["PUBLISHED", "OPTConfig", "PublishedSize"]

POSITION_OFFSET = 2  # rows 0 and 1 of the position table are never used by real tokens
ACTIVATIONS = ("relu", "gelu", "gelu_new")
BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}

# Far above OPT-175B, far below anything that could exhaust memory while being described.
_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "num_hidden_layers": 2**12,
    "ffn_dim": 2**22,
    "num_attention_heads": 2**12,
    "max_position_embeddings": 2**22,
    "word_embed_proj_dim": 2**20,
}


@dataclass(frozen=True, kw_only=True)
class OPTConfig:
    """Shape and conventions of one OPT-architecture model, with Hugging Face's field names.

    Raises:
        ConfigError: a value out of range, of the wrong type, or in contradiction with another.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None  # None: the same as hidden_size
    do_layer_norm_before: bool = (
        True  # False only in the 350M: norm after the residual, no final norm
    )
    remove_final_layer_norm: bool = False  # fine-tunes made before transformers 4.20.1
    enable_bias: bool = True  # False in Galactica
    layer_norm_elementwise_affine: bool = True  # False in Galactica
    activation_function: str = "relu"
    tie_word_embeddings: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    layerdrop: float = 0.0
    init_std: float = 0.02
    bos_token_id: int = 2
    eos_token_id: int = 2
    pad_token_id: int = 1

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        for name, limit in _LIMITS.items():
            _check_int(name, getattr(self, name), 1, limit)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not divisible by "
                f"num_attention_heads {self.num_attention_heads}"
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            _check_int(name, getattr(self, name), 0, self.vocab_size - 1)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name} must be true or false, not {value!r}")
        for name in ("dropout", "attention_dropout", "layerdrop"):
            _check_float(name, getattr(self, name), 0.0, 1.0)
        _check_float("init_std", self.init_std, 0.0, 10.0)
        if self.activation_function not in ACTIVATIONS:
            raise ConfigError(
                f"activation_function {self.activation_function!r} is unknown; "
                f"OPT models use one of {', '.join(ACTIVATIONS)}"
            )

    # ---- reading and writing -----------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OPTConfig:
        """Build from the contents of a Hugging Face ``config.json``; unknown keys are refused."""
        kwargs: dict[str, Any] = {}
        fields = {field.name for field in dataclasses.fields(cls)}
        for key, value in values.items():
            name = _FROM_HF.get(key, key)
            if name in fields:
                kwargs[name] = _null_as_default(name, value)
            elif key in _FIXED:
                if value not in _FIXED[key]:
                    allowed = " or ".join(repr(v) for v in _FIXED[key])
                    raise ConfigError(
                        f"{key} is {value!r}; this is not an OPT model (needs {allowed})"
                    )
            elif key not in _NO_EFFECT:
                raise ConfigError(
                    f"unknown key {key!r} in the model configuration{did_you_mean(key, fields)}"
                )
        required = tuple(name for name in _LIMITS if name != "word_embed_proj_dim")
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise ConfigError(f"the model configuration lacks {', '.join(missing)}")
        return cls(**kwargs)

    @classmethod
    def from_file(cls, path: str | Path) -> OPTConfig:
        """Read a ``config.json``.

        Raises:
            ConfigError: the file is missing, no JSON object, repeats a key, or is not of an OPT.
        """
        path = Path(path)
        try:
            raw = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        try:
            values = json.loads(raw, object_pairs_hook=_no_repeated_keys)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds a {type(values).__name__}, not a JSON object")
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a ``config.json`` that transformers and `from_dict` both read."""
        to_hf = {ours: theirs for theirs, ours in _FROM_HF.items()}
        values = {to_hf.get(key, key): value for key, value in dataclasses.asdict(self).items()}
        return {"architectures": ["OPTForCausalLM"], "model_type": "opt", **values}

    # ---- derived facts -----------------------------------------------------------------------

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token embedding and of the head's input (E)."""
        assert self.word_embed_proj_dim is not None
        return self.word_embed_proj_dim

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @property
    def has_projections(self) -> bool:
        return self.embed_dim != self.hidden_size

    @property
    def variant(self) -> str:
        """One line that names what differs from the base architecture."""
        notes = []
        if not self.do_layer_norm_before:
            notes.append("post-norm")
        if self.has_projections:
            notes.append("embedding projections")
        if self.remove_final_layer_norm:
            notes.append("no final norm")
        if not self.enable_bias:
            notes.append("no biases")
        if not self.layer_norm_elementwise_affine:
            notes.append("plain layer norms")
        if self.activation_function != "relu":
            notes.append(self.activation_function)
        if not self.tie_word_embeddings:
            notes.append("untied head")
        return ", ".join(notes) or "base"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every stored weight, with Hugging Face's names, in file order.

        ``lm_head.weight`` is listed only when the head is not tied to the embedding.
        """
        d, f, e = self.hidden_size, self.ffn_dim, self.embed_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.decoder.embed_tokens.weight": (self.vocab_size, e),
            "model.decoder.embed_positions.weight": (
                self.max_position_embeddings + POSITION_OFFSET,
                d,
            ),
        }
        if self.has_projections:
            shapes["model.decoder.project_in.weight"] = (d, e)
            shapes["model.decoder.project_out.weight"] = (e, d)
        if self.has_final_layer_norm:
            shapes |= self._norm("model.decoder.final_layer_norm")
        for layer in range(self.num_hidden_layers):
            prefix = f"model.decoder.layers.{layer}."
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes |= self._linear(prefix + "self_attn." + name, d, d)
            shapes |= self._norm(prefix + "self_attn_layer_norm")
            shapes |= self._linear(prefix + "fc1", f, d)
            shapes |= self._linear(prefix + "fc2", d, f)
            shapes |= self._norm(prefix + "final_layer_norm")
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, e)
        return shapes

    def _linear(self, name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {name + ".weight": (rows, columns)}
        if self.enable_bias:
            shapes[name + ".bias"] = (rows,)
        return shapes

    def _norm(self, name: str) -> dict[str, tuple[int, ...]]:
        if not self.layer_norm_elementwise_affine:
            return {}
        return {name + ".weight": (self.hidden_size,), name + ".bias": (self.hidden_size,)}

    def parameter_count(self) -> int:
        """Exact number of stored parameters (a tied head counts once)."""
        # Counted on one layer: a list of all names would be long for a large model.
        shapes = dataclasses.replace(self, num_hidden_layers=1).parameter_shapes()
        layer = sum(math.prod(s) for name, s in shapes.items() if ".layers." in name)
        rest = sum(math.prod(s) for name, s in shapes.items() if ".layers." not in name)
        return rest + layer * self.num_hidden_layers

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of all weights in "f32", "f16", "bf16", "int8" or "int4"; scales not counted."""
        return math.ceil(self.parameter_count() * BYTES_PER_WEIGHT[dtype])

    def kv_bytes_per_token(self, dtype: str = "f16") -> int:
        """Bytes of keys and values that one token of context keeps over all layers.

        In "int8" the keys and the values of each head have a float32 scale.
        """
        scales = 4 * self.num_attention_heads if dtype == "int8" else 0
        bytes_a_vector = math.ceil(self.hidden_size * BYTES_PER_WEIGHT[dtype]) + scales
        return 2 * self.num_hidden_layers * bytes_a_vector

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of one decoded token that attends to `context` tokens.

        Two per multiply-add; matrix products and attention, without norms and activations.
        """
        d, f, e = self.hidden_size, self.ffn_dim, self.embed_dim
        matrices = self.num_hidden_layers * (4 * d * d + 2 * d * f) + self.vocab_size * e
        if self.has_projections:
            matrices += 2 * d * e
        attention = self.num_hidden_layers * 2 * d * context
        return 2 * (matrices + attention)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, not {value!r}")
    if not low <= value <= high:  # false for NaN too
        raise ConfigError(f"{name} is {value}; it must lie between {low} and {high}")


def _null_as_default(name: str, value: Any) -> Any:
    if value is not None or name == "word_embed_proj_dim":
        return value
    default = {field.name: field.default for field in dataclasses.fields(OPTConfig)}[name]
    return default


def _no_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ConfigError(f"the key {key!r} appears twice")
            seen.add(key)
    return values


_FROM_HF = {"_remove_final_layer_norm": "remove_final_layer_norm"}

# Keys whose other values would mean another architecture.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("opt",),
    "learned_embeddings": (True, None),
    "scale_embeddings": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (True, False, None),
    "quantization_config": (None,),
    "layer_norm_eps": (1e-5, None),
}

# Keys that transformers and older tools write and that change nothing in the forward pass.
_NO_EFFECT = frozenset((
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_internal",
    "activation_dropout", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "label2id", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_scores", "prefix", "problem_type", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache", "dropout_cls",
    "_attn_implementation_autoset", "antemplate", "badwordsids", "formatoptns",
    "gradient_checkpointing", "max_new_tokens", "newlinemode", "nobreakmodel",
    "renormalize_logits", "static_weights", "suffix", "welcome",
    # settings of KoboldAI, which its story models carry beside the architecture
    "adventure", "chatmode", "compat", "dynamicscan", "rep_pen", "rep_pen_range", "rep_pen_slope",
    "sampler_order", "temp", "tfs", "top_a", "typical",
))  # fmt: skip


# ---- the published family --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PublishedSize:
    """One row of the OPT paper's Table 1, with the configuration of the released checkpoint."""

    config: OPTConfig
    learning_rate: float
    batch_tokens: int  # tokens a step


def _size(
    layers: int, heads: int, width: int, rate: float, batch: int, **other: Any
) -> PublishedSize:
    config = OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        ffn_dim=4 * width,
        **other,
    )
    return PublishedSize(config=config, learning_rate=rate, batch_tokens=batch)


# arXiv 2205.01068, Table 1; "M" there is 10^6 tokens.
PUBLISHED: dict[str, PublishedSize] = {
    "125m": _size(12, 12, 768, 6.0e-4, 500_000),
    "350m": _size(
        24, 16, 1024, 3.0e-4, 500_000, word_embed_proj_dim=512, do_layer_norm_before=False
    ),
    "1.3b": _size(24, 32, 2048, 2.0e-4, 1_000_000),
    "2.7b": _size(32, 32, 2560, 1.6e-4, 1_000_000),
    "6.7b": _size(32, 32, 4096, 1.2e-4, 2_000_000),
    "13b": _size(40, 40, 5120, 1.0e-4, 4_000_000),
    "30b": _size(48, 56, 7168, 1.0e-4, 4_000_000),
    "66b": _size(64, 72, 9216, 0.8e-4, 2_000_000),
    "175b": _size(96, 96, 12288, 1.2e-4, 2_000_000),
}
