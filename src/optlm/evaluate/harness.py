"""lm-evaluation-harness on our engine: its `LM` class, registered as the model "optlm".

import optlm.evaluate.harness  # then `lm_eval.simple_evaluate(model="optlm", ...)` knows it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError, did_you_mean
from optlm.score import Scorer

__all__ = ["EngineLM"]

_CHUNK = 256  # requests between two notes in the harness's cache
_MAX_NEW_TOKENS = 256  # as the harness's own hf model
# Names of the harness and transformers -> ours; None: has no meaning for one sequence.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("optlm")
class EngineLM(LM):  # type: ignore[misc]
    """The harness's model class over an `LLM`.

    Texts are encoded, cut and scored as the harness's "hf" model does (convention "lm-eval" of
    `optlm.score`), so that figures agree; what requests begin with is computed once.

    Args:
        model: as `LLM` takes it.
        llm: an engine that is loaded already.
        batch_size, max_batch_size, device: as the harness passes them. The engine fills its own
            batches; device is PyTorch's.
        options: further options of `LLM`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        llm: LLM | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device is not None:
            options["device"] = device
        self.llm = LLM(model, **options) if llm is None else llm
        self.scorer = Scorer(self.llm, convention="lm-eval")
        self._follower: Callable[[int, int], None] | None = None
        self._done = self._total = 0

    def follow(self, follower: Callable[[int, int], None] | None) -> None:
        """Tell `follower` how many requests are done, of how many, from now on."""
        self._follower = follower
        self._done = self._total = 0

    @property
    def tokenizer_name(self) -> str:
        return f"optlm-{self.scorer.tokenizer.vocab_size}"

    @property
    def eot_token_id(self) -> int:
        return self.scorer.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self.llm.config.max_position_embeddings

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation, and whether greedy decoding gives it."""
        self._total += len(requests)
        order = sorted(range(len(requests)), key=lambda place: requests[place].args[0])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for begin in range(0, len(order), _CHUNK):
            places = order[begin : begin + _CHUNK]
            scores = self.scorer.conditional([requests[place].args[:2] for place in places])
            for place, score in zip(places, scores, strict=True):
                found[place] = score.total, score.is_greedy
                self._note("loglikelihood", requests[place].args, found[place])
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability (nats) of each whole text, in windows that meet."""
        self._total += len(requests)
        found = []
        for request in requests:
            (text,) = request.args
            found.append(self.scorer.tokens([text])[0].total if text else 0.0)
            self._note("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context up to a stop string, the end token or the most tokens asked for."""
        self._total += len(requests)
        found: list[str] = []
        for begin in range(0, len(requests), _CHUNK):
            chunk = requests[begin : begin + _CHUNK]
            asked = [self._generation(*request.args[:2]) for request in chunk]
            outputs = self.llm.generate([ids for ids, _ in asked], [params for _, params in asked])
            for request, output in zip(chunk, outputs, strict=True):
                found.append(output.text)
                self._note("generate_until", request.args, output.text)
        return found

    def _generation(
        self, context: str, options: dict[str, Any]
    ) -> tuple[list[int], SamplingParams]:
        params = sampling_params(options)
        room = self.max_length - params.max_tokens
        if room < 1:
            raise RequestError(
                f"{params.max_tokens} new tokens leave no room for the prompt; the model's context "
                f"holds {self.max_length}"
            )
        return self.scorer.tokenizer.encode(context)[-room:], params

    def _note(self, kind: str, arguments: Any, answer: Any) -> None:
        self.cache_hook.add_partial(kind, arguments, answer)
        self._done += 1
        if self._follower is not None:
            self._follower(self._done, self._total)


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """The harness's `generation_kwargs` as ours.

    Raises:
        RequestError: one that has no counterpart.
    """
    rest = dict(options)
    until = rest.pop("until", None) or []
    samples = rest.pop("do_sample", None)
    values: dict[str, Any] = {"stop": [until] if isinstance(until, str) else list(until)}
    lengths = [rest.pop(name) for name in _LENGTHS if name in rest]
    values["max_tokens"] = int(lengths[0]) if lengths else _MAX_NEW_TOKENS
    for name, value in rest.items():
        if name not in _SAMPLING:
            known = (*_SAMPLING, *_LENGTHS, "until", "do_sample")
            raise RequestError(f"unknown generation option {name!r}{did_you_mean(name, known)}")
        values[name] = value
    if not samples and (samples is False or not values.get("temperature")):
        values |= {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return SamplingParams(**values)
