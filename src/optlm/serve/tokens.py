"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Any

from optlm.serve.errors import about
from optlm.serve.logprobs import token_name
from optlm.serve.requests import DetokenizeRequest, TokenizeRequest
from optlm.serve.served import Served

__all__ = ["detokenize", "tokenize", "tokenizer_info"]


def tokenize(request: TokenizeRequest, served: Served) -> dict[str, Any]:
    served.adapter_of(request.model)
    tokenizer = served.need_tokenizer("there is nothing to tokenize with")
    # false leaves the start token out; true is what the tokenizer does by itself
    with about("prompt"):
        ids = tokenizer.encode(request.prompt, None if request.add_special_tokens else False)
    answer = {"count": len(ids), "max_model_len": served.context, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [token_name(token, tokenizer) for token in ids]
    return answer


def detokenize(request: DetokenizeRequest, served: Served) -> dict[str, Any]:
    served.adapter_of(request.model)
    tokenizer = served.need_tokenizer("there is nothing to detokenize with")
    return {"prompt": tokenizer.decode(request.tokens)}


def tokenizer_info(served: Served) -> dict[str, Any]:
    """What lm-evaluation-harness asks before it tokenizes here."""
    tokenizer = served.need_tokenizer("it has nothing to tell")

    def name(token: int) -> str:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")

    return {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": name(tokenizer.bos_id),
        "eos_token": name(tokenizer.eos_id),
        "pad_token": name(tokenizer.pad_id),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "chat_template": None,
    }
