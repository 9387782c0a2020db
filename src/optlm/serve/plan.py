"""From a validated request to what the engine is asked: token ids and sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optlm.engine.params import SamplingParams
from optlm.engine.prompts import OnePrompt
from optlm.engine.request import admit_prompt
from optlm.errors import RequestError
from optlm.serve.errors import ApiError, about
from optlm.serve.fields import prompts_of
from optlm.serve.limits import Cost
from optlm.serve.requests import CompletionRequest, SamplingFields
from optlm.serve.served import Served

__all__ = ["CompletionPlan", "fit_prompt", "plan_completion", "sampling_of", "wants_usage"]

_TEXT_BYTES = 8  # of a token in an answer
_REPORT_BYTES = 96  # of one log-probability, with the names of its token
DEFAULT_TOKENS = 16  # OpenAI's default of max_tokens

# Fields that go to the engine as they are, under another name where one is given.
_PASSED = {
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "n": "n",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "include_stop_str_in_output": "include_stop",
    "ignore_eos": "ignore_eos",
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "utf8": "utf8",
}


@dataclass(frozen=True, kw_only=True)
class CompletionPlan:
    """What to run for one request, and how to word the answer.

    Attributes:
        model: the name to answer under.
        prompts: token ids of each.
        texts: what `echo` shows of each prompt.
        params: for all of them.
        echo: choices begin with their prompt.
        logprobs: alternatives a token to report in `choices[].logprobs`; None for no report.
        prompt_logprobs: the same for `choices[].prompt_logprobs`.
        names_ids: tokens appear as "token_id:123".
        stream, include_usage: how to answer.
        priority: smaller runs first.
    """

    model: str
    prompts: list[list[int]]
    texts: list[str]
    params: SamplingParams
    echo: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    names_ids: bool = False
    stream: bool = False
    include_usage: bool = False
    priority: int = 0

    def cost(self, context: int) -> Cost:
        """What the request takes at most, on a model of this context."""
        params = self.params
        read = sum(len(ids) for ids in self.prompts)
        written = sum(min(params.max_tokens, context - len(ids)) for ids in self.prompts)
        written *= params.num_samples
        shown = read * params.n if self.echo else 0
        reported = 0  # log-probabilities
        if self.logprobs is not None:
            reported += (written + shown) * (self.logprobs + 2)
        if self.prompt_logprobs is not None:
            reported += read * params.n * (self.prompt_logprobs + 2)
        answer = (written + shown) * _TEXT_BYTES + reported * _REPORT_BYTES
        return Cost(tokens=read + written, answer_bytes=answer)


def sampling_of(
    request: SamplingFields, served: Served, max_tokens: int, **more: Any
) -> SamplingParams:
    """The engine's parameters.

    Raises:
        ApiError: 404 for an unknown model, 400 for what the engine refuses.
        RequestError: the engine's own words for a combination it refuses.
    """
    values: dict[str, Any] = {"max_tokens": max_tokens, "adapter": served.adapter_of(request.model)}
    for field, name in _PASSED.items():
        value = getattr(request, field)
        if value is not None:
            values[name] = value
    if request.top_k is not None:
        values["top_k"] = max(request.top_k, 0)
    if request.seed is not None:
        values["seed"] = request.seed % 2**64
    if request.logit_bias:
        values["logit_bias"] = {int(name): bias for name, bias in request.logit_bias.items()}
    _check(request, served, max_tokens)
    try:
        params = SamplingParams(**values, **more)
        params.check_vocabulary(served.config.vocab_size)
        if params.stop and served.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        if params.utf8 and served.tokenizer is None:
            raise RequestError("utf8 needs a tokenizer, which this model lacks")
    except RequestError as error:
        field = str(error).partition(" ")[0]  # the engine's messages begin with the parameter
        known = field if field in type(request).model_fields else None
        raise ApiError(400, str(error), param=known, code="invalid_value") from None
    return params


def plan_completion(request: CompletionRequest, served: Served) -> CompletionPlan:
    """Check a request against the model and tokenize its prompts.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    if request.suffix is not None:
        raise ApiError(
            400,
            "suffix is not supported: the model reads from left to right and was not trained to "
            "fill in the middle",
            param="suffix",
            code="unsupported_field",
        )
    echo = bool(request.echo)
    params = sampling_of(
        request,
        served,
        DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens,
        best_of=request.best_of,
        logprobs=request.logprobs,
        prompt_logprobs=_prompt_logprobs(request, echo),
    )
    if params.max_tokens == 0 and not echo and params.prompt_logprobs is None:
        raise ApiError(
            400,
            "max_tokens is 0, so nothing would come back; set echo, prompt_logprobs, or at least 1",
            param="max_tokens",
            code="invalid_value",
        )
    if request.stream and params.num_samples > params.n:
        raise ApiError(
            400,
            f"best_of is {request.best_of}, more than n, which is {params.n}; it chooses among "
            "finished samples, so they cannot be streamed",
            param="best_of",
            code="invalid_value",
        )
    prompts = []
    given = prompts_of(request.prompt)
    for index, prompt in enumerate(given):
        with about("prompt", index if len(given) > 1 else None):
            prompts.append(
                fit_prompt(
                    prompt,
                    served,
                    params,
                    keep=request.truncate_prompt_tokens,
                    add_bos=request.add_special_tokens,
                )
            )
    return CompletionPlan(
        model=request.model or served.name,
        prompts=prompts,
        texts=_texts(request, prompts, served) if echo else [],
        params=params,
        echo=echo,
        logprobs=request.logprobs,
        prompt_logprobs=request.prompt_logprobs,
        names_ids=bool(request.return_tokens_as_token_ids),
        stream=bool(request.stream),
        include_usage=wants_usage(request),
        priority=request.priority or 0,
    )


def wants_usage(request: SamplingFields) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def _check(request: SamplingFields, served: Served, max_tokens: int) -> None:
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400,
            "stream_options goes with stream, which is not true",
            param="stream_options",
            code="invalid_value",
        )
    for name, value in (("max_tokens", max_tokens), ("min_tokens", request.min_tokens or 0)):
        if value > served.context:
            raise ApiError(
                400,
                f"{name} is {value}; the model's context holds {served.context} tokens",
                param=name,
                code="invalid_value",
            )


def _prompt_logprobs(request: CompletionRequest, echo: bool) -> int | None:
    """How many alternatives the engine must report of prompt tokens, for `echo` or in their own."""
    wanted = (request.prompt_logprobs, request.logprobs if echo else None)
    return max((count for count in wanted if count is not None), default=None)


def fit_prompt(
    prompt: OnePrompt,
    served: Served,
    params: SamplingParams,
    *,
    keep: int | None = None,
    add_bos: bool | None = None,
) -> list[int]:
    """Token ids of a prompt that leaves room for a token in the context.

    Args:
        keep: a longer prompt loses its oldest tokens after a start token, down to this many.
        add_bos: whether a text gets the start token; None for what the tokenizer does.

    Raises:
        RequestError, ContextLengthError: it cannot be read, or does not fit.
    """
    tokenizer = served.tokenizer
    if isinstance(prompt, str) and (keep is not None or add_bos is not None):
        prompt = served.need_tokenizer("give token ids").encode(prompt, add_bos)
        prompt = prompt or [served.config.eos_token_id]
    if keep is not None and len(prompt) > keep:
        starts = prompt[0] == served.config.bos_token_id and keep > 1
        prompt = [*prompt[: int(starts)], *prompt[len(prompt) - keep + int(starts) :]]
    return admit_prompt(prompt, tokenizer, params, served.config)[0]


def _texts(request: CompletionRequest, prompts: list[list[int]], served: Served) -> list[str]:
    """What `echo` shows: a text as it was given, or what is left of it, or what ids stand for."""
    tokenizer = served.tokenizer
    if tokenizer is None:
        return [""] * len(prompts)
    whole = request.truncate_prompt_tokens is None
    return [
        given if isinstance(given, str) and whole else tokenizer.decode(ids)
        for given, ids in zip(prompts_of(request.prompt), prompts, strict=True)
    ]
