"""Tiny random checkpoints of every OPT variant, and the means to write them to disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from optlm.config import OPTConfig

State = dict[str, NDArray[np.float32]]


def _tiny(**values: object) -> OPTConfig:
    """A base OPT of 2 layers whose every width differs from the others."""
    shape: dict[str, object] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "ffn_dim": 112,
        "num_attention_heads": 3,
        "max_position_embeddings": 64,
        "init_std": 0.1,
    }
    return OPTConfig(**(shape | values))  # type: ignore[arg-type]


VARIANTS: dict[str, OPTConfig] = {
    "base": _tiny(),
    "350m": _tiny(do_layer_norm_before=False, word_embed_proj_dim=32, num_hidden_layers=3),
    "galactica": _tiny(
        enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"
    ),
    "no_final_norm": _tiny(remove_final_layer_norm=True),
    "untied": _tiny(tie_word_embeddings=False, vocab_size=307),
    "foreign": _tiny(num_attention_heads=2, hidden_size=32, ffn_dim=96),
    "mini": _tiny(
        vocab_size=512, hidden_size=64, num_attention_heads=4, ffn_dim=160, num_hidden_layers=3
    ),
}


def make_state(config: OPTConfig, seed: int = 0) -> State:
    """Random float32 weights by Hugging Face name; norms and biases are far from 1 and 0."""
    random = np.random.default_rng(seed)
    state = {}
    for name, shape in config.parameter_shapes().items():
        values = random.normal(0.0, 1.0, shape)
        if "layer_norm.weight" in name:
            values = 1.0 + 0.3 * values
        elif "bias" in name:
            values *= 0.2
        elif "embed" in name or "lm_head" in name:
            values *= 0.3
        else:
            values *= 1.2 / np.sqrt(shape[-1])
        state[name] = values.astype(np.float32)
    return state


def write_checkpoint(folder: Path, config: OPTConfig, state: State, *, dtype: str = "f32") -> Path:
    """Write config.json, model.safetensors (f32, f16 or bf16), tokenizer.json; return `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    values = {**config.to_dict(), "torch_dtype": names[dtype]}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    if dtype == "bf16":
        _save_bf16(folder / "model.safetensors", state)
    else:
        cast = {
            name: np.ascontiguousarray(value.astype(names[dtype])) for name, value in state.items()
        }
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def to_bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to bfloat16 (nearest, ties to even), as its 16 bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _save_bf16(path: Path, state: State) -> None:
    """numpy has no bfloat16, so the file is laid out here: header length, JSON header, data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs, position = [], 0
    for name in sorted(state):
        blob = to_bf16_bits(state[name]).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(state[name].shape),
            "data_offsets": [position, position + len(blob)],
        }
        blobs.append(blob)
        position += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


@functools.cache
def tiny_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` entries with OPT's special ids, ``</s>`` first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False) for token in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = "the cat sat on the mat and then the other cats went to their home in the rain again "
    tokenizer.train_from_iterator(
        [words * 3, words.title(), "Once upon a time there was a little " * 2], trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    return tokenizer
