"""A student's first weights, cut from its teacher.

Layers are chosen; a narrower residual stream keeps the directions (or coordinates) that hold most
of it (`optlm.train.distil.narrow`); attention heads that do little go, narrower ones keep the
best approximation of what they compare and what they move (a truncated SVD of the product of each
pair of matrices, Eckart and Young 1936); the feed-forward units with the smallest weights go. What
the shapes leave alone is copied bit for bit: a student of the teacher's shape is the teacher.

Letters: D, F, H, K, E, V as in `optlm.model`, the student's in small letters where they differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optlm.config import POSITION_OFFSET, OPTConfig
from optlm.errors import ConfigError
from optlm.train.distil.narrow import Stream, choose_basis, top_directions
from optlm.train.distil.weights_of import Weights

__all__ = ["cut_student", "cut_stream", "kept_layers", "why_no_cut"]

State = dict[str, Tensor]
Affine = tuple[Tensor, Tensor | None]  # weight and bias of a linear map

_SAME = (
    "do_layer_norm_before",
    "remove_final_layer_norm",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "activation_function",
    "tie_word_embeddings",
)
_NO_LARGER = (
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "max_position_embeddings",
    "word_embed_proj_dim",
)


def why_no_cut(teacher: OPTConfig, student: OPTConfig, layers: tuple[int, ...]) -> str | None:
    """The reason why `student` cannot be cut from `teacher`, None if it can."""
    for name in _SAME:
        if getattr(teacher, name) != getattr(student, name):
            return f"{name} is {getattr(student, name)}, the teacher's {getattr(teacher, name)}"
    for name in _NO_LARGER:
        if getattr(student, name) > getattr(teacher, name):
            return (
                f"{name} is {getattr(student, name)}, above the teacher's {getattr(teacher, name)}"
            )
    if layers and len(layers) != student.num_hidden_layers:
        return (
            f"student.layers lists {len(layers)} layers, the model has {student.num_hidden_layers}"
        )
    if any(not 0 <= i < teacher.num_hidden_layers for i in layers):
        last = teacher.num_hidden_layers - 1
        return f"student.layers is {list(layers)}; the teacher has 0 to {last}"
    if student.hidden_size == teacher.hidden_size:
        return _why_no_other_embedding(teacher, student)
    if student.hidden_size < 2:
        return "hidden_size is 1; a normed stream needs at least 2"
    folded = teacher.do_layer_norm_before and teacher.layer_norm_elementwise_affine
    if folded and not teacher.enable_bias:
        return "the norms' biases have no linear biases to move into; keep hidden_size"
    if teacher.has_projections and not student.has_projections:
        return (
            "the teacher's embedding is read through projections, the student's would not be; "
            f"set word_embed_proj_dim to at most {teacher.embed_dim}, not to hidden_size"
        )
    return None


def _why_no_other_embedding(teacher: OPTConfig, student: OPTConfig) -> str | None:
    if student.has_projections != teacher.has_projections:
        return (
            f"word_embed_proj_dim is {student.embed_dim}, the teacher's {teacher.embed_dim}; with "
            "the teacher's hidden_size it cannot change between with and without projections"
        )
    return None


def kept_layers(teacher: int, student: int) -> tuple[int, ...]:
    """`student` of `teacher` layers, evenly spread, the first and the last among them."""
    if student == 1:
        return (0,)
    return tuple(round(i * (teacher - 1) / (student - 1)) for i in range(student))


def cut_stream(teacher: OPTConfig, student: OPTConfig, moments: Tensor | None) -> Stream:
    """How the student's stream stands for the teacher's; `moments` (D, D) serve a narrower one."""
    folded = teacher.do_layer_norm_before
    if student.hidden_size == teacher.hidden_size:
        return Stream(basis=None, folded=folded)
    assert moments is not None
    basis = choose_basis(moments, student.hidden_size, pick=not folded)
    # A tied head without projections and without norm weights has no other place for the gain.
    bare = student.tie_word_embeddings and not student.has_projections
    bare = bare and teacher.has_final_layer_norm and not teacher.layer_norm_elementwise_affine
    gain = (teacher.hidden_size / student.hidden_size) ** 0.5
    return Stream(basis=basis, folded=folded, scale=gain if bare else 1.0)


@torch.no_grad()
def cut_student(
    teacher: OPTConfig,
    student: OPTConfig,
    weights: Weights,
    *,
    stream: Stream,
    layers: tuple[int, ...] = (),
) -> State:
    """All weights of the student, by Hugging Face's name.

    Args:
        weights: the teacher's.
        layers: the teacher's layers that are kept, in the student's order; empty: evenly spread.

    Raises:
        ConfigError: the student's shape cannot be cut from the teacher's; the message says why.
    """
    if reason := why_no_cut(teacher, student, layers):
        raise ConfigError(
            f"the student cannot be cut from the teacher: {reason}. With student.init 'random' any "
            "shape learns"
        )
    layers = layers or kept_layers(teacher.num_hidden_layers, student.num_hidden_layers)
    state = _Ends(teacher, student, weights, stream).state()
    for new, old in enumerate(layers):
        given = _Layer(teacher, weights, f"model.decoder.layers.{old}.")
        for name, value in _cut_layer(given, student, stream).items():
            state[f"model.decoder.layers.{new}.{name}"] = value
    shapes = student.parameter_shapes()
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    return {name: state[name].contiguous() for name in shapes}


# ---- one layer ----------------------------------------------------------------------------------


class _Layer:
    """The weights of one of the teacher's layers."""

    def __init__(self, config: OPTConfig, weights: Weights, prefix: str) -> None:
        self.config, self._weights, self._prefix = config, weights, prefix

    def linear(self, name: str) -> Affine:
        bias = self._weights(f"{self._prefix}{name}.bias") if self.config.enable_bias else None
        return self._weights(f"{self._prefix}{name}.weight"), bias

    def norm(self, name: str) -> tuple[Tensor, Tensor] | None:
        if not self.config.layer_norm_elementwise_affine:
            return None
        return (
            self._weights(f"{self._prefix}{name}.weight"),
            self._weights(f"{self._prefix}{name}.bias"),
        )


def _cut_layer(layer: _Layer, student: OPTConfig, stream: Stream) -> State:
    norm = layer.norm("self_attn_layer_norm")
    q, k, v = (
        stream.read(*layer.linear(f"self_attn.{name}_proj"), norm) for name in ("q", "k", "v")
    )
    q, k, v, out = _cut_heads(
        q, k, v, _written(stream, layer.linear("self_attn.out_proj")), layer.config, student
    )
    ffn_norm = layer.norm("final_layer_norm")
    fc1 = stream.read(*layer.linear("fc1"), ffn_norm)
    fc1, fc2 = _cut_units(fc1, _written(stream, layer.linear("fc2")), student.ffn_dim)
    maps = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v}
    maps |= {"self_attn.out_proj": out, "fc1": fc1, "fc2": fc2}
    norms = {"self_attn_layer_norm": stream.norm(norm), "final_layer_norm": stream.norm(ffn_norm)}
    return _named({**maps, **{name: pair for name, pair in norms.items() if pair}})


def _named(maps: dict[str, Affine]) -> State:
    state = {f"{name}.weight": weight for name, (weight, _) in maps.items()}
    return state | {f"{name}.bias": bias for name, (_, bias) in maps.items() if bias is not None}


def _written(stream: Stream, linear: Affine) -> Affine:
    weight, bias = linear
    return stream.written(weight), None if bias is None else stream.written(bias)


def _cut_units(fc1: Affine, fc2: Affine, count: int) -> tuple[Affine, Affine]:
    """Keep the feed-forward units with the largest weights on both sides, in their order."""
    if count == len(fc1[0]):
        return fc1, fc2
    size = fc1[0].norm(dim=1) * fc2[0].norm(dim=0)
    kept = size.topk(count).indices.sort().values
    bias = None if fc1[1] is None else fc1[1][kept]
    return (fc1[0][kept], bias), (fc2[0][:, kept], fc2[1])


def _cut_heads(
    q: Affine, k: Affine, v: Affine, out: Affine, teacher: OPTConfig, student: OPTConfig
) -> tuple[Affine, Affine, Affine, Affine]:
    heads, width = student.num_attention_heads, student.head_dim
    if (heads, width) == (teacher.num_attention_heads, teacher.head_dim):
        return q, k, v, out
    # Per head: rows of q, k, v with the bias as a last column, (H, K, d + 1); columns of out.
    rows = [_by_head(_with_bias(linear), teacher) for linear in (q, k, v)]
    columns = _by_head(out[0].T, teacher).mT  # (H, d, K)
    moved = rows[2].flatten(1).norm(dim=1) * columns.flatten(1).norm(dim=1)
    kept = moved.topk(heads).indices.sort().values
    pieces = [_cut_head(*(m[h] for m in (*rows, columns)), width=width) for h in kept]
    q_rows, k_rows, v_rows, o_columns = (torch.stack(m) for m in zip(*pieces, strict=True))
    biased = q[1] is not None
    new_q, new_k, new_v = (_without_bias(m.flatten(0, 1), biased) for m in (q_rows, k_rows, v_rows))
    return new_q, new_k, new_v, (o_columns.movedim(0, 1).flatten(1), out[1])


def _by_head(rows: Tensor, config: OPTConfig) -> Tensor:
    """(H K, n) to (H, K, n)."""
    return rows.reshape(config.num_attention_heads, config.head_dim, -1)


def _cut_head(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One head (K, d + 1) three times and (d, K) with `width` instead of K numbers."""
    full = q.shape[0]
    q = q * (width / full) ** 0.5  # the student divides its scores by the root of its own width
    if width == full:
        return q, k, v, out
    if width > full:
        pad = (0, 0, 0, width - full)
        pad_columns = (0, width - full)
        q, k, v = (torch.nn.functional.pad(m, pad) for m in (q, k, v))
        return q, k, v, torch.nn.functional.pad(out, pad_columns)
    new_q, new_k = _best_product(q.T, k, width)
    new_out, new_v = _best_product(out, v, width)
    return new_q.T, new_k, new_v, new_out


def _best_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(m, rank) and (rank, n) whose product is nearest to that of (m, K) and (K, n)."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    root = s[:rank].sqrt()
    return q_left @ u[:, :rank] * root, root[:, None] * (v[:rank] @ q_right.T)


def _with_bias(linear: Affine) -> Tensor:
    weight, bias = linear
    last = torch.zeros(len(weight), 1) if bias is None else bias[:, None]
    return torch.cat([weight, last], dim=1)


def _without_bias(rows: Tensor, biased: bool) -> Affine:
    return rows[:, :-1], rows[:, -1] if biased else None


# ---- both ends: embeddings, last norm, head -----------------------------------------------------


class _Ends:
    """The student's embeddings, last norm and head."""

    def __init__(
        self, teacher: OPTConfig, student: OPTConfig, weights: Weights, stream: Stream
    ) -> None:
        self._teacher, self._student, self._stream = teacher, student, stream
        self._source = weights
        self._head = None if student.tie_word_embeddings else weights("lm_head.weight")

    def _weights(self, name: str) -> Tensor:
        return self._source(f"model.decoder.{name}.weight")

    def state(self) -> State:
        stream, student = self._stream, self._student
        rows = student.max_position_embeddings + POSITION_OFFSET
        positions = stream.written(self._weights("embed_positions")[:rows].T).T
        state = {"embed_positions.weight": positions}
        state |= self._projected() if student.has_projections else self._plain()
        state = {f"model.decoder.{name}": value for name, value in state.items()}
        if self._head is not None:
            state["lm_head.weight"] = state.pop("model.decoder.lm_head.weight")
        return state

    def _final_norm(self) -> tuple[Tensor, Tensor] | None:
        """What the head sees of the last norm; None without one or without weights."""
        teacher = self._teacher
        if not (teacher.has_final_layer_norm and teacher.layer_norm_elementwise_affine):
            return None
        bias = self._source("model.decoder.final_layer_norm.bias")
        return self._weights("final_layer_norm"), bias

    def _projected(self) -> State:
        """Embedding of width e, and a projection on either side of the stream."""
        embedding = self._weights("embed_tokens")
        inward = outward = torch.eye(self._teacher.embed_dim)
        if self._teacher.has_projections:
            inward, outward = self._weights("project_in"), self._weights("project_out")
        head = self._head
        if self._student.embed_dim < self._teacher.embed_dim:
            seen = embedding if head is None else head
            kept = top_directions(embedding.T @ embedding + seen.T @ seen, self._student.embed_dim)
            embedding, inward, outward = embedding @ kept, inward @ kept, kept.T @ outward
            head = None if head is None else head @ kept
        out, norm = self._read_by_head(outward)
        state = {
            "embed_tokens.weight": embedding,
            "project_in.weight": self._stream.written(inward),
            "project_out.weight": out,
        }
        if head is not None:
            state["lm_head.weight"] = head
        return state | norm

    def _plain(self) -> State:
        """Embedding and head as wide as the stream."""
        stream = self._stream
        state = {"embed_tokens.weight": stream.written(self._weights("embed_tokens").T).T}
        if self._head is not None:
            head, final = self._read_by_head(self._head)
            return state | {"lm_head.weight": head} | final
        norm = self._final_norm()
        if norm is None:
            return state
        if stream.basis is None:
            weight, bias = norm
        else:  # the tied head leaves room for a diagonal only
            basis = stream.basis
            weight = (basis * norm[0][:, None] * basis).sum(0) * stream.gain
            bias = basis.T @ norm[1]
        return state | {"final_layer_norm.weight": weight, "final_layer_norm.bias": bias}

    def _read_by_head(self, matrix: Tensor) -> tuple[Tensor, State]:
        """`matrix` (n, D) behind the last norm, and that norm.

        A head has no bias that could take over the norm's, so the student's norm gets the nearest
        one there is.
        """
        stream, norm = self._stream, self._final_norm()
        if stream.basis is None or not self._teacher.has_final_layer_norm:
            narrow = matrix if stream.basis is None else matrix @ stream.basis
            return narrow, {} if norm is None else _named({"final_layer_norm": norm})
        narrow, _ = stream.read(matrix, None, norm)
        if norm is None:
            return narrow, {}
        weight, _ = stream.norm(norm) or norm
        bias = torch.linalg.lstsq(narrow, (matrix @ norm[1])[:, None]).solution[:, 0]
        return narrow, _named({"final_layer_norm": (weight, bias)})
