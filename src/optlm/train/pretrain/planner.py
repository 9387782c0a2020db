"""What it takes to train a model on many GPUs: memory, traffic and days, by arithmetic alone.

Nothing is measured here. The achieved speed of a GPU goes in; everything else follows from shapes:

- state and traffic of FSDP: Rajbhandari et al., ZeRO (arXiv 1910.02054), sections 5 and 7;
- sums of tensor parallelism: Shoeybi et al., Megatron-LM (arXiv 1909.08053), section 3;
- activations of a layer: Korthikanti et al. (arXiv 2205.05198), equation 2 without the squares of
  the context, which a fused attention does not keep.

Bytes are counted as sent, or as received, by one GPU. 1 GB is 10^9 bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from optlm.checkpoint.layout import check_tensor_parallel
from optlm.config import PUBLISHED, OPTConfig
from optlm.errors import ConfigError

__all__ = ["Plan", "PlanRequest", "plan", "render"]

_SCHEMES = {
    # weights gathered, gradients gathered; kept: weights, gradients, moments, master or average
    "paper": (2, 2, 2 + 2 + 8 + 4),  # float16, with a float32 master: section 2.4 of the paper
    "optlm": (4, 4, 4 + 4 + 8 + 4),  # float32, with a moving average; products in half precision
}
_ACTIVATION = 2  # bytes: half precision
_LOSS_ROWS = 512  # rows of logits at a time


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A model, its tokens and the machines.

    Raises:
        ConfigError: sizes that are out of range or do not divide.
    """

    config: OPTConfig
    tokens: float  # to train on
    batch_tokens: float  # of one step
    gpus: int
    tensor: int = 1  # GPUs that share each matrix
    tflops: float  # a GPU really does, a second; recomputed layers count as work
    memory_gb: float = 80.0  # of a GPU
    sequences: int | None = None  # of a group at once; None: the largest power of two that fits
    recompute: bool = True  # layers run again in the backward pass instead of being remembered
    scheme: str = "optlm"  # or "paper": what is kept of every weight

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_tokens", "gpus", "tensor", "tflops", "memory_gb"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.scheme not in _SCHEMES:
            raise ConfigError(f"scheme is {self.scheme!r}; use one of {', '.join(_SCHEMES)}")
        if self.gpus % self.tensor:
            raise ConfigError(
                f"{self.gpus} GPUs cannot be divided into groups of {self.tensor} for tensor "
                "parallelism; change one of them"
            )
        check_tensor_parallel(dataclasses.replace(self.config, attention_dropout=0.0), self.tensor)
        if self.sequences is not None and self.sequences < 1:
            raise ConfigError(f"sequences is {self.sequences}; it must be at least 1")
        if self.group_sequences < 1:
            raise ConfigError(
                f"a batch of {self.batch_tokens:,.0f} tokens gives {self.groups} data-parallel "
                f"groups less than one sequence of {self.config.max_position_embeddings} each; "
                "take a larger batch, fewer GPUs or more tensor parallelism"
            )

    @property
    def groups(self) -> int:
        """Data-parallel groups, each of `tensor` GPUs."""
        return self.gpus // self.tensor

    @property
    def group_sequences(self) -> int:
        """Sequences of a step that one group reads, rounded to whole ones."""
        return round(self.batch_tokens / self.config.max_position_embeddings / self.groups)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer; memory and traffic are those of one GPU."""

    parameters: int
    flops_per_token: float  # forward, backward and what is run again
    flops: float  # of the whole training
    steps: int
    tokens_per_second: float
    step_seconds: float
    days: float
    sequences: int  # of a group at once
    micro_batches: int  # of a group, a step
    memory_gb: dict[str, float]  # by purpose
    fits: bool
    data_traffic_gb: float  # a step: weights gathered, gradients summed, over the network
    tensor_traffic_gb: float  # a step: sums within a tensor-parallel group
    data_gb_per_second: float  # that the network must carry if all of it is hidden behind work
    tensor_gb_per_second: float
    checkpoint_gb: float  # all of it


def plan(request: PlanRequest) -> Plan:
    """Work out what training takes."""
    config, flops = request.config, training_flops(request.config, recompute=request.recompute)
    speed = request.gpus * request.tflops * 1e12 / flops
    seconds = request.batch_tokens / speed
    sequences = request.sequences or _most_sequences(request)
    micro_batches = math.ceil(request.group_sequences / sequences)
    memory = _memory(request, sequences)
    data = _data_traffic(request) * micro_batches / 1e9
    tensor = _tensor_traffic(request) / 1e9
    return Plan(
        parameters=config.parameter_count(),
        flops_per_token=flops,
        flops=flops * request.tokens,
        steps=math.ceil(request.tokens / request.batch_tokens),
        tokens_per_second=speed,
        step_seconds=seconds,
        days=request.tokens / speed / 86_400,
        sequences=sequences,
        micro_batches=micro_batches,
        memory_gb=memory,
        fits=sum(memory.values()) <= request.memory_gb,
        data_traffic_gb=data,
        tensor_traffic_gb=tensor,
        data_gb_per_second=data / seconds,
        tensor_gb_per_second=tensor / seconds,
        checkpoint_gb=config.parameter_count() * _kept(request) / 1e9,
    )


def training_flops(config: OPTConfig, *, recompute: bool) -> float:
    """Floating-point operations for one token of a full context.

    The backward pass takes twice the forward pass. Attention counts the whole square of the
    context, as Megatron-LM and OPT's chronicles do.
    """
    forward = config.flops_per_token(config.max_position_embeddings)
    head = 2 * config.vocab_size * config.embed_dim
    return 3.0 * forward + (forward - head if recompute else 0.0)


def _kept(request: PlanRequest) -> int:
    """Bytes of a weight in a checkpoint: all that is kept but the gradient."""
    _gathered, gradient, state = _SCHEMES[request.scheme]
    return state - gradient


def _most_sequences(request: PlanRequest) -> int:
    sequences = 1
    while (
        sequences * 2 <= request.group_sequences
        and sum(_memory(request, sequences * 2).values()) <= request.memory_gb
    ):
        sequences *= 2
    return sequences


def _layer_parameters(config: OPTConfig) -> int:
    shapes = dataclasses.replace(config, num_hidden_layers=1).parameter_shapes()
    return sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name)


def _memory(request: PlanRequest, sequences: int) -> dict[str, float]:
    """GB by purpose while `sequences` are in work."""
    config, tensor = request.config, request.tensor
    gathered, gradient, state = _SCHEMES[request.scheme]
    total, layer = config.parameter_count(), _layer_parameters(config)
    outside = total - layer * config.num_hidden_layers  # embeddings and head: there all the time
    tokens = sequences * config.max_position_embeddings
    between = _ACTIVATION * tokens * config.hidden_size  # what enters a layer
    inside = tokens * config.hidden_size * (10 + 24 / tensor)  # equation 2, bytes
    layers = config.num_hidden_layers
    kept = between * layers + inside if request.recompute else inside * layers
    numbers = {
        "weights, gradients and optimizer, this GPU's share": state * total / request.gpus,
        "layer at work and the next, gathered": 2 * gathered * layer / tensor,
        "gradient of a layer before its sum": gradient * layer / tensor,
        "embeddings and head, gathered, with gradient": (gathered + gradient) * outside / tensor,
        "activations": kept,
        "loss, some rows of logits at a time": 8 * _LOSS_ROWS * config.vocab_size / tensor,
    }
    return {name: value / 1e9 for name, value in numbers.items()}


def _data_traffic(request: PlanRequest) -> float:
    """Bytes of one micro-batch: weights gathered forward and backward, gradients summed."""
    gathered, gradient, _ = _SCHEMES[request.scheme]
    share = request.config.parameter_count() / request.tensor
    return share * (2 * gathered + gradient) * (request.groups - 1) / request.groups


def _tensor_traffic(request: PlanRequest) -> float:
    """Bytes of a step: two sums a layer and pass, and those of embedding and head.

    A sum over t GPUs moves 2 (t - 1) / t of its size (a ring).
    """
    config, parts = request.config, request.tensor
    tokens = request.group_sequences * config.max_position_embeddings
    passes = 3 if request.recompute else 2  # forward, backward, forward again
    sums = 2 * passes * config.num_hidden_layers * config.hidden_size + 2 * config.embed_dim
    return _ACTIVATION * tokens * sums * 2 * (parts - 1) / parts


def request_for(size: str, **values: object) -> PlanRequest:
    """A request for a published size, with the batch of the OPT paper's Table 1.

    Raises:
        ConfigError: there is no such size.
    """
    if size not in PUBLISHED:
        raise ConfigError(f"there is no size {size!r}; the sizes are {', '.join(PUBLISHED)}")
    published = PUBLISHED[size]
    defaults = {"config": published.config, "batch_tokens": published.batch_tokens}
    return PlanRequest(**(defaults | values))  # type: ignore[arg-type]


def render(request: PlanRequest, result: Plan) -> str:
    """The plan as text for people."""
    recomputed = "layers run again in the backward pass" if request.recompute else "nothing rerun"
    lines = [
        f"{result.parameters:,} parameters, {request.tokens:.4g} tokens, {result.steps:,} steps of "
        f"{request.batch_tokens:,.0f} tokens",
        f"{request.gpus} GPUs as {request.groups} data-parallel groups of {request.tensor}, "
        f"{request.tflops:g} TFLOP/s each",
        f"{result.flops_per_token:.4g} FLOPs a token ({recomputed}), {result.flops:.4g} in all",
        f"{result.tokens_per_second:,.0f} tokens/s, {result.step_seconds:.1f} s a step, "
        f"{result.days:.1f} days without a failure",
        "",
        f"memory of a GPU, {result.sequences} sequences at once ({result.micro_batches} times a "
        "step), GB:",
        *(f"  {value:8.2f}  {name}" for name, value in result.memory_gb.items()),
        f"  {sum(result.memory_gb.values()):8.2f}  of {request.memory_gb:g}"
        + ("" if result.fits else ": DOES NOT FIT"),
        "",
        "traffic of a GPU in a step, each way:",
        f"  {result.data_traffic_gb:8.1f} GB between groups ({result.data_gb_per_second:.2f} GB/s "
        "if hidden behind work)",
        f"  {result.tensor_traffic_gb:8.1f} GB within a group "
        f"({result.tensor_gb_per_second:.2f} GB/s)",
        f"a checkpoint: {result.checkpoint_gb:,.0f} GB, "
        f"{result.checkpoint_gb / request.gpus:.2f} of each GPU",
    ]
    return "\n".join(lines)
