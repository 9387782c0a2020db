"""A model spread over processes: tensor parallelism by DTensor, then FSDP2 over the rows.

The plan is Megatron's (arXiv 1909.08053, section 3): queries, keys, values and `fc1` by output
rows, `out_proj` and `fc2` by inputs, so each block needs one sum over the processes each way.
Embedding and head, tied or not, are cut by rows of the vocabulary; of the 350M projections
`project_in` by output rows and `project_out` by inputs. Norms, positions and the biases of sums
stay whole.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from optlm.config import OPTConfig
from optlm.model import OPT, Attention, OPTOutput

__all__ = ["Own", "Root", "cut_by_tensor", "local_of"]


class Root(nn.Module):
    """The model as FSDP sees it: weights are gathered for any function of the model, then let go.

    Layers are gathered one after another as they run; embeddings, last norm, projections and head
    are there for as long as the function runs.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.model = model
        self.cut = mesh is not None
        if mesh is not None:
            assert isinstance(model, OPT)
            for layer in model.decoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)
            for module in self.modules():
                if isinstance(module, FSDPModule):  # gradients are sums over predictions, not means
                    module.set_gradient_divide_factor(1.0)
                    module.set_force_sum_reduction_for_comms(True)

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with warnings.catch_warnings():
            # A layer returns keys and values as views; nothing changes them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            return self(function, *arguments)

    def let_go(self) -> None:
        """Drop what was gathered for a function that had no backward pass."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def cut_by_tensor(model: OPT, mesh: DeviceMesh) -> None:
    """Cut `model` in place over the processes of a 1-D mesh; logits come out whole."""
    parallelize_module(model, mesh, _plan(model.config))
    for module in model.modules():
        if isinstance(module, Attention):
            module.heads //= mesh.size()

    def spread(_module: nn.Module, _inputs: Any, states: Tensor) -> Tensor:
        return DTensor.from_local(states, mesh, [Replicate()], run_check=False)

    def join(_module: nn.Module, _inputs: Any, output: OPTOutput) -> OPTOutput:
        states = output.hidden_states
        return dataclasses.replace(
            output,
            logits=_whole(output.logits),
            hidden_states=None if states is None else tuple(map(_whole, states)),
        )

    model.decoder.hook_final.register_forward_hook(spread)  # what the head, cut by rows, reads
    model.register_forward_hook(join)


def _plan(config: OPTConfig) -> dict[str, ParallelStyle]:
    decoder = "model.decoder."
    plan: dict[str, ParallelStyle] = {
        decoder + "embed_tokens": RowwiseParallel(input_layouts=Replicate())
    }
    if config.has_projections:
        plan[decoder + "project_in"] = ColwiseParallel(output_layouts=Replicate())
        plan[decoder + "project_out"] = RowwiseParallel(input_layouts=Replicate())
    if not config.tie_word_embeddings:
        plan["lm_head"] = ColwiseParallel()
    once = (Replicate(), None, None, None)  # one sum of the gradient for q, k and v together
    for index in range(config.num_hidden_layers):
        layer = f"{decoder}layers.{index}."
        plan[layer + "self_attn"] = PrepareModuleInput(
            input_layouts=once, desired_input_layouts=once
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            plan[layer + "self_attn." + name] = ColwiseParallel()
        plan[layer + "self_attn.out_proj"] = RowwiseParallel()
        plan[layer + "fc1"], plan[layer + "fc2"] = ColwiseParallel(), RowwiseParallel()
    return plan


def _whole(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


def local_of(values: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds, not copied."""
    return values.to_local() if isinstance(values, DTensor) else values


class Own(nn.Module):
    """The parameters of a spread model as plain tensors: the part that this process owns.

    Optimizer, average and checkpoints work element by element, so they see nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._pairs = [
            (name, p, nn.Parameter(local_of(p.detach()), requires_grad=p.requires_grad))
            for name, p in model.named_parameters()
        ]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, own) for name, _p, own in self._pairs)

    def take_gradients(self) -> None:
        """Move the gradients of the model to the plain parameters."""
        for _name, p, own in self._pairs:
            if p.grad is not None:
                gradient = p.grad
                if isinstance(gradient, DTensor) and isinstance(p, DTensor):
                    gradient = gradient.redistribute(placements=p.placements)
                own.grad = local_of(gradient)
                p.grad = None
