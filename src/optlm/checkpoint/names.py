"""From the names that other tools give OPT's weights to Hugging Face's names.

    model.decoder.*   transformers, OPTForCausalLM
    decoder.*         transformers, OPTModel (the published 350M); metaseq
    (bare)            transformers, OPTDecoder

metaseq further writes `layer_norm` for the final norm, `project_in_dim`, `output_projection`, and
fuses the three attention inputs in one `qkv_proj`, stored in the order K, V, Q.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from optlm.checkpoint.tensor import WEIGHT_DTYPES, Array, Tensor, as_float, same_bits
from optlm.config import OPTConfig
from optlm.errors import Fault, did_you_mean

CANONICAL = "model.decoder."
EMBEDDING = CANONICAL + "embed_tokens.weight"
HEAD = "lm_head.weight"

_PREFIX = re.compile(r"(model\.decoder\.|decoder\.)?")
_HEAD_NAMES = frozenset({"lm_head.weight", "output_projection.weight"})
_UNUSED = frozenset({"version"})  # metaseq's format number
_RENAMED = {
    "layer_norm.weight": "final_layer_norm.weight",
    "layer_norm.bias": "final_layer_norm.bias",
    "project_in_dim.weight": "project_in.weight",
    "project_out_dim.weight": "project_out.weight",
}
_FUSED = re.compile(r"(.*layers\.\d+\.self_attn\.)qkv_proj\.(weight|bias)")
FUSED_ORDER = ("k_proj", "v_proj", "q_proj")


@dataclass(frozen=True, kw_only=True)
class Named:
    """Tensors under Hugging Face's names, and what was wrong with those that are not here."""

    tensors: dict[str, Tensor]
    prefixes: frozenset[str]
    faults: list[Fault]


def to_hugging_face(stored: Mapping[str, Tensor]) -> Named:
    """Rename and split tensors; names that match no rule are kept and judged by `fit`."""
    tensors: dict[str, Tensor] = {}
    prefixes = set()
    faults = []
    for name, tensor in stored.items():
        match = _PREFIX.match(name)
        assert match is not None
        rest = name[match.end() :]
        if rest in _UNUSED:
            continue
        if rest not in _HEAD_NAMES:
            prefixes.add(match.group())
        for ours, part in _renamed(rest, tensor):
            if ours in tensors:
                message = f"is the same weight as {tensors[ours].name!r}; one of them must go"
                faults.append(Fault(code="duplicate-name", where=name, message=message))
            else:
                tensors[ours] = part
    if len(prefixes) > 1:
        shown = " and ".join(repr(prefix) for prefix in sorted(prefixes))
        message = f"the names begin with {shown}; parts of two checkpoints seem mixed"
        faults.append(Fault(code="mixed-names", where="weights", message=message))
    return Named(tensors=tensors, prefixes=frozenset(prefixes), faults=faults)


def _renamed(rest: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if rest in _HEAD_NAMES:
        yield HEAD, tensor
        return
    for name, part in (split_fused(replace(tensor, name=rest)) or {rest: tensor}).items():
        yield CANONICAL + _RENAMED.get(name, name), part


def split_fused(tensor: Tensor) -> dict[str, Tensor]:
    """The three projections inside a fused `qkv_proj` by their names; nothing for other tensors."""
    fused = _FUSED.fullmatch(tensor.name)
    if not fused or not tensor.shape or tensor.shape[0] % 3:
        return {}
    names = [f"{fused[1]}{name}.{fused[2]}" for name in FUSED_ORDER]
    return {name: _third(tensor, name, third) for third, name in enumerate(names)}


def _third(tensor: Tensor, name: str, which: int) -> Tensor:
    rows = tensor.shape[0] // 3

    def read() -> Array:
        third: Array = tensor.raw()[which * rows : (which + 1) * rows]
        return third

    return replace(tensor, name=name, shape=(rows, *tensor.shape[1:]), read=read)


def fit(named: Named, config: OPTConfig) -> tuple[dict[str, Tensor], list[Fault]]:
    """The tensors of `config.parameter_shapes()`, in that order, and all that does not fit."""
    shapes = config.parameter_shapes()
    faults = list(named.faults)
    tensors = dict(named.tensors)
    if config.tie_word_embeddings and HEAD in tensors:
        faults += _tied_head_faults(tensors.get(EMBEDDING), tensors.pop(HEAD))
    for name in _neutral(tensors, shapes, config):
        del tensors[name]
    faults += _missing(shapes.keys() - tensors.keys(), config)
    faults += _extra((name for name in tensors if name not in shapes), tensors, shapes, config)
    fitting = {}
    for name, shape in shapes.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        faults += _tensor_faults(name, tensor, shape)
        fitting[name] = replace(tensor, name=name)
    return fitting, faults


def _neutral(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, object], config: OPTConfig
) -> list[str]:
    """Stored weights that a model without biases or norm weights leaves out, with no effect at all.

    Galactica was published as a plain OPT with such zeros and ones before configurations could say
    so.
    """
    if config.enable_bias and config.layer_norm_elementwise_affine:
        return []
    full = dataclasses.replace(config, enable_bias=True, layer_norm_elementwise_affine=True)
    found = []
    for name, shape in full.parameter_shapes().items():
        tensor = tensors.get(name)
        if name in shapes or tensor is None:
            continue
        if tensor.shape == shape and tensor.dtype in WEIGHT_DTYPES:
            effect = 0.0 if name.endswith(".bias") else 1.0
            if (as_float(tensor.raw(), tensor.dtype) == effect).all():
                found.append(name)
    return found


def _tensor_faults(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[Fault]:
    faults = []
    if tensor.shape != shape:
        message = f"has shape {list(tensor.shape)}; the configuration asks for {list(shape)}"
        faults.append(Fault(code="shape", where=name, message=message))
    if tensor.dtype not in WEIGHT_DTYPES:
        message = (
            f"is stored as {tensor.dtype}; OPT weights are F32, F16 or BF16 (quantized elsewhere?)"
        )
        faults.append(Fault(code="dtype", where=name, message=message))
    return faults


def _tied_head_faults(embedding: Tensor | None, head: Tensor) -> list[Fault]:
    if embedding is None:
        return []  # reported as a missing embedding
    same = embedding.dtype == head.dtype and embedding.shape == head.shape
    if same and (embedding.dtype not in WEIGHT_DTYPES or same_bits(embedding.raw(), head.raw())):
        return []
    message = (
        "differs from the token embedding, although the configuration ties them; "
        'if the head was trained apart, set "tie_word_embeddings": false in config.json'
    )
    return [Fault(code="tied-head", where=head.name, message=message)]


def _missing(names: Iterable[str], config: OPTConfig) -> list[Fault]:
    return [
        Fault(code="missing-tensor", where=name, message="is missing" + _missing_hint(name, config))
        for name in sorted(names, key=_by_layer)
    ]


def _missing_hint(name: str, config: OPTConfig) -> str:
    if name == HEAD:
        return '; the head is not tied ("tie_word_embeddings": false), so it must be stored'
    if name.startswith(CANONICAL + "final_layer_norm"):
        return '; fine-tunes made before transformers 4.20.1 need "_remove_final_layer_norm": true'
    if name.endswith("layer_norm.weight") or name.endswith("layer_norm.bias"):
        return '; Galactica models need "layer_norm_elementwise_affine": false'
    if name.endswith(".bias"):
        return '; Galactica models need "enable_bias": false'
    return ""


def _extra(
    names: Iterable[str],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, object],
    config: OPTConfig,
) -> list[Fault]:
    message = "belongs to no OPT weight of this configuration"
    faults: list[Fault] = []
    for name in names:
        # Nearest names take milliseconds each to find; hostile files have many and long ones.
        hint = _extra_hint(name, shapes, config) if len(faults) < 10 and len(name) < 100 else ""
        faults.append(Fault(code="extra-tensor", where=tensors[name].name, message=message + hint))
    return faults


def _extra_hint(name: str, shapes: Mapping[str, object], config: OPTConfig) -> str:
    layer = re.match(re.escape(CANONICAL) + r"layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return f" (num_hidden_layers is {config.num_hidden_layers})"
    if name.startswith(CANONICAL + "final_layer_norm"):
        return " (it has no final layer norm)"
    return did_you_mean(name, shapes) if len(shapes) < 500 else ""


def _by_layer(name: str) -> tuple[int, str]:
    layer = re.search(r"layers\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)
