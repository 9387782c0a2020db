"""Low-rank adapters: LoRA, DoRA and rsLoRA, from peft's names to changes of the base's matrices.

Letters: r rank, V vocabulary, E embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optlm.checkpoint.adapterconfig import MAX_RANK, AdapterSettings
from optlm.checkpoint.faults import error_of
from optlm.checkpoint.load import Checkpoint
from optlm.checkpoint.names import CANONICAL
from optlm.checkpoint.tensor import Tensor
from optlm.config import OPTConfig
from optlm.errors import Fault

__all__ = ["EMBEDDING", "HEAD", "LowRank", "read_matrices"]

Float32 = NDArray[np.float32]

_PREFIX = re.compile(r"(base_model\.model\.)?(model\.decoder\.|decoder\.)?")
_LORA = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.default)?(\.weight)?"
)
_PARTS = {
    "lora_A": "a",
    "lora_embedding_A": "a",
    "lora_B": "b",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
}
EMBEDDING = CANONICAL + "embed_tokens"
HEAD = "lm_head"


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change of one matrix W: W + scale B A, and with DoRA each of its vectors made as long as
    `magnitude` says (arXiv 2402.09353): rows of a projection, columns of an embedding."""

    a: Tensor  # (r, inputs); of an embedding (r, V)
    b: Tensor  # (outputs, r); of an embedding (E, r)
    magnitude: Tensor | None  # (outputs,); of an embedding (E,)
    scale: float
    embedding: bool

    def merged(self, weight: Float32) -> Float32:
        """W with the change, in float32."""
        change = self.b.numpy() @ self.a.numpy()
        changed = weight + np.float32(self.scale) * (change.T if self.embedding else change)
        if self.magnitude is not None:
            axis = 0 if self.embedding else 1
            lengths = np.sqrt(np.square(changed).sum(axis=axis, keepdims=True))
            changed *= np.expand_dims(self.magnitude.numpy(), axis) / lengths
        merged: Float32 = changed.astype(np.float32, copy=False)
        return merged


def read_matrices(
    folder: Path, settings: AdapterSettings, tensors: Mapping[str, Tensor], base: Checkpoint
) -> dict[str, LowRank]:
    faults: list[Fault] = []
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        start = _PREFIX.match(key)
        assert start is not None
        rest = key[start.end() :]
        found = _LORA.fullmatch(rest)
        if found is None:
            faults += _whole_weight_faults(key, _full_name(rest), tensor, base)
            continue
        parts = modules.setdefault(_full_name(found["module"]), {})
        part = _PARTS[found["part"]]
        if part in parts:
            message = f"is the same part as {parts[part].name!r}; one of them must go"
            faults.append(Fault(code="adapter-collision", where=key, message=message))
        parts[part] = tensor
    shapes = _targets(base.config)
    for module, parts in modules.items():
        faults += _module_faults(module, parts, settings, shapes)
    faults += _missing_modules(settings, modules, shapes)
    if not modules and not faults:
        faults.append(Fault(code="adapter-empty", where=str(folder), message="holds no matrices"))
    if faults:
        raise error_of(faults)
    return {
        module: LowRank(
            a=parts["a"],
            b=parts["b"],
            magnitude=parts.get("magnitude"),
            scale=settings.scale(module, parts["a"].shape[0]),
            embedding=module == EMBEDDING,
        )
        for module, parts in modules.items()
    }


def _full_name(rest: str) -> str:
    return rest if rest.startswith(HEAD) else CANONICAL + rest


def _targets(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    """Modules that a low-rank adapter may change, with the shape of their weight."""
    shapes: dict[str, tuple[int, ...]] = {
        name.removesuffix(".weight"): shape
        for name, shape in config.parameter_shapes().items()
        if len(shape) == 2 and not name.endswith("embed_positions.weight")
    }
    return shapes | {HEAD: (config.vocab_size, config.embed_dim)}


def _module_faults(
    module: str,
    parts: Mapping[str, Tensor],
    settings: AdapterSettings,
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Fault]:
    def fault(code: str, message: str) -> Fault:
        return Fault(code=code, where=module, message=message)

    if module not in shapes:
        yield fault("adapter-shape", "is no matrix of this base that an adapter can change")
        return
    wanted_parts = {"a", "b"} | ({"magnitude"} if settings.dora else set())
    if set(parts) != wanted_parts:
        has, wants = sorted(parts), sorted(wanted_parts)
        yield fault("adapter-half-written", f"has the parts {has}, not {wants}")
        return
    outputs, inputs = shapes[module]
    if module == EMBEDDING:
        outputs, inputs = inputs, outputs
    rank = parts["a"].shape[0] if parts["a"].shape else 0
    if not 1 <= rank <= MAX_RANK:
        yield fault("adapter-rank", f"has rank {rank}; it must lie in 1..{MAX_RANK}")
        return
    wanted = {"a": (rank, inputs), "b": (outputs, rank), "magnitude": (outputs,)}
    for part, tensor in parts.items():
        if tensor.shape != wanted[part]:
            have, want = list(tensor.shape), list(wanted[part])
            yield fault("adapter-shape", f"{part} has shape {have}; this base needs {want}")


def _whole_weight_faults(key: str, name: str, tensor: Tensor, base: Checkpoint) -> list[Fault]:
    """peft stores embeddings beside an adapter that changes them; they must be the base's own."""
    name = name.replace(".base_layer.", ".")
    own = base.tensors.get(name)
    if own is None and name == HEAD + ".weight":
        own = base.tensors[EMBEDDING + ".weight"]
    if own is None:
        message = "belongs to no low-rank adapter of an OPT"
        return [Fault(code="adapter-key", where=key, message=message)]
    if own.shape == tensor.shape and np.array_equal(own.numpy(), tensor.numpy()):
        return []
    message = "is a whole weight that is not the base's own; merge it with the tool that made it"
    return [Fault(code="adapter-unsupported", where=key, message=message)]


def _missing_modules(
    settings: AdapterSettings,
    modules: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Fault]:
    """Matrices that the settings promise to change and the file does not: it was cut, or edited."""
    if not settings.all_layers:
        return []
    missing = [
        module
        for module in shapes
        for target in settings.targets
        if (module == target or module.endswith("." + target)) and module not in modules
    ]
    message = "is among target_modules, but the file has no change of it; is it incomplete?"
    return [Fault(code="adapter-half-written", where=m, message=message) for m in missing]
