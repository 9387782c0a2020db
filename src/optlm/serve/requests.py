"""The bodies that clients send. Ranges are the API's; `SamplingParams` has the engine's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from optlm.serve.fields import (
    MAX_PROMPTS,
    Biases,
    Prompt,
    Stops,
    Strict,
    TextOrIds,
    TokenIds,
)

__all__ = [
    "ChatRequest", "CompletionRequest", "DetokenizeRequest", "EmbeddingRequest", "Message",
    "SamplingFields", "ScoreRequest", "StreamOptions", "TokenizeRequest",
]  # fmt: skip

MAX_CHOICES = 128  # of one prompt
MAX_LOGPROBS = 100  # alternatives of one token

Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
ModelName = Annotated[str, Field(max_length=256)]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=0, le=2**20)]


class StreamOptions(Strict):
    """Attributes: include_usage: end a stream with the number of tokens."""

    include_usage: bool = False


class SamplingFields(Strict):
    """What completions and chat share. null is as good as not given."""

    model: ModelName | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    logit_bias: Biases | None = None
    n: Choices | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    utf8: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**24)] | None = None
    min_p: Fraction | None = None
    min_tokens: Tokens | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=2**20)] | None = None
    priority: Priority | None = None
    return_tokens_as_token_ids: bool | None = None
    user: Annotated[str, Field(max_length=512)] | None = None


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Tokens | None = None
    best_of: Choices | None = None
    echo: bool | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: Annotated[str, Field(max_length=64)] | None = None


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


class ScoreRequest(Strict):
    """`POST /v1/score`: how likely each continuation of one context is."""

    model: ModelName | None = None
    context: TextOrIds
    continuations: Annotated[list[TextOrIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    priority: Priority | None = None


class EmbeddingRequest(Strict):
    """`POST /v1/embeddings`."""

    input: Prompt
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True
    dimensions: int | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    priority: Priority | None = None


class TokenizeRequest(Strict):
    """`POST /tokenize`."""

    prompt: str
    model: ModelName | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Strict):
    """`POST /detokenize`."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=2**24)]], Field(max_length=2**17)]
    model: ModelName | None = None
