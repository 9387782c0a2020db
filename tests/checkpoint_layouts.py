"""Writers of every layout in which OPT weights are found, from one Hugging Face state."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

from optlm.config import OPTConfig
from variants import State

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path, OPTConfig, Tensors], None]


def as_torch(state: State, dtype: str) -> Tensors:
    return {name: torch.from_numpy(value).to(TORCH_DTYPES[dtype]) for name, value in state.items()}


def write_config(folder: Path, config: OPTConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def _renamed(tensors: Tensors, prefix: str) -> Tensors:
    return {name.replace("model.decoder.", prefix): value for name, value in tensors.items()}


def _shards(tensors: Tensors, count: int = 3) -> list[Tensors]:
    names = list(tensors)
    return [{name: tensors[name] for name in names[part::count]} for part in range(count)]


def _write_shards(folder: Path, tensors: Tensors, stem: str, suffix: str) -> None:
    shards = _shards(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        weight_map |= dict.fromkeys(shard, name)
        if suffix == "safetensors":
            save_file(shard, folder / name, metadata={"format": "pt"})
        else:
            torch.save(shard, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def safetensors(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_tied_head(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    head = tensors["model.decoder.embed_tokens.weight"].clone()
    safetensors(folder, config, {"lm_head.weight": head, **tensors})


def decoder_prefix(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    safetensors(folder, config, _renamed(tensors, "decoder."))


def bare_names(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    safetensors(folder, config, _renamed(tensors, ""))


def sharded_safetensors(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    _write_shards(folder, tensors, "model", "safetensors")


def torch_file(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    head = tensors.get("lm_head.weight", tensors["model.decoder.embed_tokens.weight"])
    torch.save({**tensors, "lm_head.weight": head}, folder / "pytorch_model.bin")


def torch_parameters(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    """Parameters instead of tensors, in strided memory, inside a module's own state dictionary."""
    write_config(folder, config)
    module = torch.nn.Module()
    for name, value in _renamed(tensors, "").items():
        strided = value.t().contiguous().t() if value.ndim == 2 else value
        module.register_parameter(name.replace(".", "!"), torch.nn.Parameter(strided))
    state = module.state_dict(keep_vars=True)
    for name in list(state):
        state[name.replace("!", ".")] = state.pop(name)
    torch.save(state, folder / "pytorch_model.bin")


def sharded_torch(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    _write_shards(folder, _renamed(tensors, "decoder."), "pytorch_model", "bin")


# ---- metaseq -------------------------------------------------------------------------------------


def metaseq_names(config: OPTConfig, tensors: Tensors, *, fused: bool) -> Tensors:
    named = {"decoder.version": torch.tensor([3.0])}
    for name, value in tensors.items():
        name = name.replace("model.decoder.", "decoder.")
        name = name.replace("lm_head.", "decoder.output_projection.")
        for side in ("in", "out"):
            name = name.replace(f"decoder.project_{side}.", f"decoder.project_{side}_dim.")
        if name.startswith("decoder.final_layer_norm"):
            name = name.replace("final_layer_norm", "layer_norm")
        named[name] = value
    if config.tie_word_embeddings:
        named["decoder.output_projection.weight"] = named["decoder.embed_tokens.weight"]
    return _fuse(named) if fused else named


def _fuse(named: Tensors) -> Tensors:
    fused = {}
    for name, value in named.items():
        if ".k_proj." in name:
            pieces = [named[name.replace("k_proj", letter + "_proj")] for letter in "kvq"]
            fused[name.replace("k_proj", "qkv_proj")] = torch.cat(pieces)
        elif ".q_proj." not in name and ".v_proj." not in name:
            fused[name] = value
    return fused


def split_parts(named: Tensors, count: int) -> list[Tensors]:
    """Cut as metaseq's model parallelism does; the head is kept as each part's own rows."""
    parts: list[Tensors] = [{} for _ in range(count)]
    for name, value in named.items():
        pieces = [value] * count
        if "qkv_proj" in name:
            thirds = [third.chunk(count) for third in value.chunk(3)]
            pieces = [torch.cat([third[part] for third in thirds]) for part in range(count)]
        elif name.endswith(("fc2.weight", "out_proj.weight")):
            pieces = list(value.chunk(count, dim=1))
        elif any(key in name for key in ("embed_tokens", "fc1", "_proj.", "output_proj")):
            whole = name.endswith("out_proj.bias") or "project_" in name
            pieces = pieces if whole else list(value.chunk(count, dim=0))
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece.clone()
    return parts


def metaseq_settings(config: OPTConfig) -> dict[str, Any]:
    return {
        "_name": "transformer_lm",
        "decoder_embed_dim": config.hidden_size,
        "decoder_input_dim": config.embed_dim,
        "decoder_layers": config.num_hidden_layers,
        "decoder_ffn_embed_dim": config.ffn_dim,
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_normalize_before": config.do_layer_norm_before,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "activation_fn": config.activation_function,
        "disable_bias": not config.enable_bias,
        "disable_affine_ln": not config.layer_norm_elementwise_affine,
        "no_scale_embedding": True,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
    }


def metaseq_single(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    model = metaseq_names(config, tensors, fused=False)
    settings = argparse.Namespace(**metaseq_settings(config))
    torch.save({"args": settings, "cfg": None, "model": model}, folder / "restored.pt")


def metaseq_parts(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    write_parts(folder, config, tensors, fused=False, count=2)


def metaseq_fused_parts(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    write_config(folder, config)
    write_parts(folder, config, tensors, fused=True, count=4)


def write_parts(
    folder: Path, config: OPTConfig, tensors: Tensors, *, fused: bool, count: int
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with fake_omegaconf() as node:
        settings = node({"model": metaseq_settings(config), "task": {"data": "x"}})
        named = metaseq_names(config, tensors, fused=fused)
        for part, model in enumerate(split_parts(named, count)):
            paths.append(folder / f"reshard-model_part-{part}.pt")
            torch.save({"cfg": settings, "model": model, "extra_state": {"epoch": 1}}, paths[-1])
    return paths


def metaseq_flat_shards(folder: Path, config: OPTConfig, tensors: Tensors) -> None:
    """Two model parts, each flattened per module and cut over three files, as FSDP saves them."""
    write_config(folder, config)
    named = metaseq_names(config, tensors, fused=True)
    named.pop("decoder.output_projection.weight")
    if not config.tie_word_embeddings:
        named["decoder.output_projection.weight"] = tensors["lm_head.weight"]
    for part, model in enumerate(split_parts(named, 2)):
        for number, shard in enumerate(flat_shards(model, 3)):
            torch.save(shard, folder / f"checkpoint_last-model_part-{part}-shard{number}.pt")


def flat_shards(model: Tensors, count: int) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = [
        {"model": {}, "shard_metadata": {"param_metadata": [], "buffer_names": ["decoder.version"]}}
        for _ in range(count)
    ]
    version = model.pop("decoder.version")
    layers = {".".join(name.split(".")[:3]) for name in model if ".layers." in name}
    for path in ["", *sorted(layers)]:
        inside = {
            name: value
            for name, value in model.items()
            if (name.startswith(path + ".") if path else ".layers." not in name)
        }
        flat = torch.cat([value.flatten() for value in inside.values()])
        pieces = list(flat.chunk(count))
        padding = [len(pieces[0]) - len(piece) for piece in pieces]
        for shard, piece, pad in zip(shards, pieces, padding, strict=True):
            content = {
                "names": tuple("_fpw_module." + name.removeprefix(path + ".") for name in inside),
                "shapes": tuple(value.shape for value in inside.values()),
                "numels": tuple(value.numel() for value in inside.values()),
                "padding": pad,
            }
            key = f"{path}.flat_param_0" if path else "flat_param_0"
            shard["model"][key] = torch.nn.functional.pad(piece, (0, pad)).clone()
            entry = {"fsdp_path": path, "params": {"flat_param_0": content}}
            shard["shard_metadata"]["param_metadata"].append(entry)
            shard["model"]["decoder.version"] = version
    return shards


@contextmanager
def fake_omegaconf() -> Iterator[Callable[[Any], Any]]:
    """Classes with omegaconf's names and layout, so that pickles refer to them as real ones do."""
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self, content: dict[str, Any]) -> None:
            self.__dict__ |= {"_metadata": {"ref_type": dict}, "_parent": None}
            self.__dict__["_content"] = {key: node(value) for key, value in content.items()}

    class AnyNode:
        def __init__(self, value: object) -> None:
            self.__dict__["_val"] = value

    def node(value: Any) -> Any:
        return DictConfig(value) if isinstance(value, dict) else AnyNode(value)

    for kind in (DictConfig, AnyNode):
        kind.__module__, kind.__qualname__ = "omegaconf.dictconfig", kind.__name__
        setattr(module, kind.__name__, kind)
    fakes = {"omegaconf": types.ModuleType("omegaconf"), module.__name__: module}
    with mock.patch.dict(sys.modules, fakes):
        yield node


LAYOUTS: dict[str, Writer] = {
    writer.__name__: writer
    for writer in (
        safetensors,
        with_tied_head,
        decoder_prefix,
        bare_names,
        sharded_safetensors,
        torch_file,
        torch_parameters,
        sharded_torch,
        metaseq_single,
        metaseq_parts,
        metaseq_fused_parts,
        metaseq_flat_shards,
    )
}


def expected(tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    return {name: value.float().numpy() for name, value in tensors.items()}
