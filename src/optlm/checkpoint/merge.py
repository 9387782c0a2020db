"""Merging an adapter into the weights of its base, when they are read."""

from __future__ import annotations

import dataclasses

from optlm.checkpoint.adapter import Adapter
from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.load import Checkpoint
from optlm.checkpoint.lowrank import EMBEDDING, HEAD, LowRank
from optlm.checkpoint.tensor import Tensor

__all__ = ["merge_adapter"]


def merge_adapter(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """`base` with the adapter's changes in its weights, computed in float32 when they are read.

    A change of the embedding alone, or of the head alone, unties the two: the result has
    ``tie_word_embeddings`` false and both matrices.

    Raises:
        CheckpointError: an adapter of virtual tokens, which is no change of weights.
    """
    if not adapter.mergeable:
        raise fault_error(
            "adapter-not-mergeable",
            adapter.folder,
            f"is a {adapter.settings.kind}: virtual tokens are no change of weights and cannot be "
            "merged",
        )
    config, tensors = base.config, dict(base.tensors)
    if config.tie_word_embeddings and adapter.matrices.keys() & {HEAD, EMBEDDING}:
        config = dataclasses.replace(config, tie_word_embeddings=False)
        tied = tensors[EMBEDDING + ".weight"]
        tensors[HEAD + ".weight"] = dataclasses.replace(tied, name=HEAD + ".weight")
    for module, change in adapter.matrices.items():
        name = module + ".weight"
        tensors[name] = _merged_tensor(tensors[name], change)
    return dataclasses.replace(
        base,
        config=config,
        tensors={name: tensors[name] for name in config.parameter_shapes()},
        layout=f"{base.layout}, adapter merged",
    )


def _merged_tensor(tensor: Tensor, change: LowRank) -> Tensor:
    return dataclasses.replace(tensor, dtype="F32", read=lambda: change.merged(tensor.numpy()))
