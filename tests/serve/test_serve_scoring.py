"""Numbers over HTTP: they are those of `optlm score`, and shared beginnings are computed once."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from live_server import Running, running
from optlm.engine.llm import LLM
from optlm.score import Scorer
from optlm.serve.logprobs import TokenReports, token_name
from optlm.tokenizer import Tokenizer
from variants import VARIANTS, make_state, write_checkpoint

TEXT = "Once upon a time there was a little girl named Lily. She loved to play."
CONTEXT = "The quick dog ran over the hill and then it saw " * 12 + "a"
ENDINGS = [" cat", " house", " very big tree", " boy", " dog."]


def test_echo_gives_the_numbers_of_score(client: openai.OpenAI, llm: LLM) -> None:
    (wanted,) = Scorer(llm).tokens([TEXT])
    answer = client.completions.create(
        model="mini", prompt=TEXT, max_tokens=1, logprobs=1, echo=True, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs[:-1] == wanted.logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert len(logprobs.token_logprobs) == len(wanted.logprobs) + 1
    for name, value, top in zip(
        logprobs.tokens[1:], logprobs.token_logprobs[1:], logprobs.top_logprobs[1:], strict=True
    ):
        assert top[name] == value
    greedy = [
        value == max(top.values())
        for value, top in zip(
            logprobs.token_logprobs[1:-1], logprobs.top_logprobs[1:-1], strict=True
        )
    ]
    assert greedy == wanted.greedy[1:]
    assert bytes(b for raw in logprobs.bytes[1:-1] for b in raw).decode() == TEXT
    assert logprobs.token_ids[:-1] == llm.tokenizer.encode(TEXT)
    starts = [TEXT[place:] for place in logprobs.text_offset[1:-1]]
    assert all(
        start.startswith(name) for start, name in zip(starts, logprobs.tokens[1:-1], strict=True)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_scores_over_http(tmp_path: Path, name: str) -> None:
    config = VARIANTS[name]
    llm = LLM(write_checkpoint(tmp_path / "m", config, make_state(config)), threads=1)
    scorer = Scorer(llm)
    with running(llm) as server, httpx.Client(base_url=server.url) as http:
        body = {"context": "the cat", "continuations": [" sat", " on the mat"]}
        found = http.post("/v1/score", json=body).json()["data"]
        wanted = scorer.continuations("the cat", [" sat", " on the mat"])
        assert [one["token_logprobs"] for one in found] == [w.logprobs for w in wanted]
        echo = {"prompt": "the cat sat", "echo": True, "logprobs": 2, "max_tokens": 3}
        answer = http.post("/v1/completions", json=echo).json()["choices"][0]
        got = answer["logprobs"]["token_logprobs"][: -3 or None]
        assert got == scorer.tokens(["the cat sat"])[0].logprobs
        vector = http.post("/v1/embeddings", json={"input": "the cat", "normalize": False}).json()
        wanted_vector = llm_vector = vector["data"][0]["embedding"]
        assert len(llm_vector) == (config.word_embed_proj_dim or config.hidden_size)
    (own,) = llm.embed(["the cat"])
    assert np.array_equal(np.array(wanted_vector, np.float32), own.vector)


def test_score_reads_what_endings_share_once(http: httpx.Client, llm: LLM) -> None:
    body = {"context": CONTEXT, "continuations": ENDINGS}
    answer = http.post("/v1/score", json=body).json()
    wanted = Scorer(llm).continuations(CONTEXT, ENDINGS)
    assert [one["logprob"] for one in answer["data"]] == [w.total for w in wanted]
    assert [one["is_greedy"] for one in answer["data"]] == [all(w.greedy) for w in wanted]
    encode = llm.tokenizer.encode
    shared = len(encode(CONTEXT))
    inner = sum(len(w.token_ids) - 1 for w in wanted)  # the last token of each is never read
    usage = answer["usage"]
    assert usage["forward_tokens"] + usage["prompt_tokens_details"]["cached_tokens"] <= (
        shared + inner
    )


def test_score_takes_token_ids(http: httpx.Client, llm: LLM) -> None:
    encode = llm.tokenizer.encode
    context, endings = "Once upon a", [" time", " table there was"]
    ids = [encode(ending, False) for ending in endings]
    texts = http.post("/v1/score", json={"context": context, "continuations": endings}).json()
    for given in (
        {"context": encode(context), "continuations": ids},
        {"context": context, "continuations": ids},
        {"context": encode(context), "continuations": [endings[0], ids[1]]},
    ):
        answer = http.post("/v1/score", json=given).json()
        assert [one["token_ids"] for one in answer["data"]] == ids
        assert answer["data"] == texts["data"]
    (wanted,) = llm.score([[7, 8, 9, 10]])
    body = {"context": [7, 8], "continuations": [[9, 10]]}  # no start token is added to ids
    (found,) = http.post("/v1/score", json=body).json()["data"]
    assert found["token_logprobs"] == wanted.logprobs[2:]


def test_many_endings_hold_up_nobody(http: httpx.Client, server: Running) -> None:
    body = {"context": "the cat sat " * 80, "continuations": [" on the mat"] * 500}
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx.post, f"{server.url}/v1/score", json=body, timeout=60)
        longest = 0.0
        while not slow.done():
            begun = time.monotonic()
            assert http.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - begun)
        assert slow.result().status_code == 200
    assert longest < 1
    begun = time.monotonic()
    answer = http.post("/v1/score", json=body | {"context": "the cat sat " * 300})
    assert time.monotonic() - begun < 1  # refused before anything is encoded 500 times
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "request_too_large"


def test_five_endings_cost_a_third_of_one_by_one(http: httpx.Client) -> None:
    def seconds(salt: str, groups: list[list[str]]) -> float:
        begun = time.perf_counter()
        for number, group in enumerate(groups):
            context = f"{salt}{number if len(groups) > 1 else ''} {CONTEXT}"
            answer = http.post("/v1/score", json={"context": context, "continuations": group})
            assert answer.status_code == 200
        return time.perf_counter() - begun

    together = min(seconds(f"a{turn}", [ENDINGS]) for turn in range(5))
    apart = min(seconds(f"b{turn}", [[ending] for ending in ENDINGS]) for turn in range(5))
    assert apart > 3 * together


def test_embeddings_through_the_client(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.embeddings.create(model="mini", input=["a cat", "a dog"])  # asks for base64
    assert [one.index for one in answer.data] == [0, 1]
    vectors = [one.embedding for one in answer.data]
    assert all(abs(np.linalg.norm(vector) - 1) < 1e-5 for vector in vectors)
    raw = http.post("/v1/embeddings", json={"input": "a cat", "encoding_format": "base64"}).json()
    decoded = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    assert decoded.tolist() == vectors[0]
    assert raw["kind"].startswith("hidden states")
    last = client.embeddings.create(
        model="mini", input="a cat", extra_body={"pooling": "last"}, encoding_format="float"
    )
    assert last.data[0].embedding != vectors[0]


def test_tokens_there_and_back(http: httpx.Client, llm: LLM) -> None:
    text = "Héllo \U0001f600 wörld"
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode(text)
    assert found["count"] == len(found["token_strs"])
    assert found["max_model_len"] == 1024
    bare = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == found["tokens"][1:]
    back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}


def test_no_two_tokens_share_a_name_in_one_report(llm: LLM) -> None:
    (output,) = llm.generate(["\U0001f600"], _whole())
    assert isinstance(llm.tokenizer, Tokenizer)
    reports = TokenReports(llm.tokenizer, llm.config.vocab_size, names_ids=False)
    (entry,) = output.logprobs
    found = reports.alternatives(entry)
    assert len(found) == llm.config.vocab_size
    assert found[token_name(entry.token_id, llm.tokenizer)] == entry.logprob


def test_tokens_as_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="mini", prompt="a", max_tokens=2, logprobs=2,
        extra_body={"return_tokens_as_token_ids": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == [f"token_id:{token}" for token in logprobs.token_ids]
    assert all(name.startswith("token_id:") for top in logprobs.top_logprobs for name in top)


def _whole() -> object:
    from optlm.engine.params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, logprobs="all")
