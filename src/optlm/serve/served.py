"""`Served`: what a server answers for: a model, the names of its adapters, its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from optlm.config import OPTConfig
from optlm.engine.llm import LLM
from optlm.errors import did_you_mean
from optlm.serve.errors import ApiError
from optlm.tokenizer import Tokenizer

__all__ = ["Served"]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model under the name that clients use.

    Attributes:
        tokenizer: None when only token ids can be read; no text comes back then either.
        adapters: the names that requests may use besides `name`, at this moment, and what the
            engine calls each.
        created: when it was loaded, in seconds since 1970.
    """

    name: str
    config: OPTConfig
    tokenizer: Tokenizer | None
    adapters: Callable[[], Mapping[str, str]]
    created: int

    @classmethod
    def of(
        cls,
        llm: LLM,
        name: str,
        created: int,
        adapters: Callable[[], Mapping[str, str]] | None = None,
    ) -> Served:
        """What `llm` is, with the adapters it has loaded unless others are given."""
        tokenizer = llm.tokenizer if isinstance(llm.tokenizer, Tokenizer) else None
        return cls(
            name=name,
            config=llm.config,
            tokenizer=tokenizer,
            adapters=adapters or (lambda: {name: name for name in llm.adapters}),
            created=created,
        )

    @property
    def context(self) -> int:
        """Tokens of prompt and output together."""
        return self.config.max_position_embeddings

    def adapter_of(self, model: str | None) -> str | None:
        """What the engine calls the adapter that `model` means; None for the model itself.

        Raises:
            ApiError: 404, there is no such name.
        """
        if model is None or model == self.name:
            return None
        adapters = self.adapters()
        if model in adapters:
            return adapters[model]
        near = did_you_mean(model, [self.name, *adapters])
        raise ApiError(
            404,
            f"there is no model {model!r:.80}{near}; /v1/models lists those there are",
            param="model",
            code="model_not_found",
        )

    def need_tokenizer(self, why: str) -> Tokenizer:
        """Raises: ApiError: 400, the model has none."""
        if self.tokenizer is None:
            raise ApiError(400, f"this model has no tokenizer; {why}", code="no_tokenizer")
        return self.tokenizer
