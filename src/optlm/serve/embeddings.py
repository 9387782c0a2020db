"""`/v1/embeddings`: pooled hidden states of the last layer, which is what a base model has."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.engine.outputs import EmbedOutput
from optlm.engine.request import as_token_ids
from optlm.errors import ContextLengthError
from optlm.serve.errors import ApiError, about
from optlm.serve.fields import prompts_of
from optlm.serve.limits import Cost
from optlm.serve.requests import EmbeddingRequest
from optlm.serve.served import Served

__all__ = ["EmbeddingPlan", "embedding_answer", "plan_embedding"]


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """Attributes: inputs: token ids of each text."""

    request: EmbeddingRequest
    model: str
    adapter: str | None
    inputs: list[list[int]]
    width: int

    @property
    def cost(self) -> Cost:
        tokens = sum(len(ids) for ids in self.inputs)
        return Cost(tokens=tokens, answer_bytes=len(self.inputs) * self.width * 24)


def plan_embedding(request: EmbeddingRequest, served: Served) -> EmbeddingPlan:
    """Check and tokenize.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    if request.dimensions is not None:
        raise ApiError(
            400,
            "dimensions is not supported: the vectors are the model's hidden states, which were "
            "not trained to be cut short",
            param="dimensions",
            code="unsupported_field",
        )
    adapter = served.adapter_of(request.model)
    texts = prompts_of(request.input)
    inputs = []
    for index, text in enumerate(texts):
        with about("input", index if len(texts) > 1 else None):
            ids = as_token_ids(text, served.tokenizer, served.config, room=served.context)
            if len(ids) > served.context:
                raise ContextLengthError(
                    f"the text has {len(ids)} tokens; the model's context holds {served.context}"
                )
            inputs.append(ids)
    return EmbeddingPlan(
        request=request,
        model=request.model or served.name,
        adapter=adapter,
        inputs=inputs,
        width=served.config.word_embed_proj_dim or served.config.hidden_size,
    )


def embedding_answer(plan: EmbeddingPlan, outputs: list[EmbedOutput]) -> dict[str, Any]:
    request = plan.request
    data = [
        {"object": "embedding", "index": index, "embedding": _worded(output.vector, request)}
        for index, output in enumerate(outputs)
    ]
    tokens = sum(len(output.token_ids) for output in outputs)
    return {
        "object": "list",
        "model": plan.model,
        "data": data,
        "kind": f"hidden states of the last layer, {request.pooling} pooling",
        "normalized": request.normalize,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _worded(vector: NDArray[np.float32], request: EmbeddingRequest) -> list[float] | str:
    values = vector.astype(np.float64)
    length = float(np.linalg.norm(values))
    if request.normalize and length > 0:
        values /= length
    single = values.astype("<f4")
    if request.encoding_format == "base64":
        return base64.b64encode(single.tobytes()).decode()
    numbers: list[float] = single.tolist()
    return numbers
