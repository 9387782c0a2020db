"""`/v1/completions` through OpenAI's own client."""

from __future__ import annotations

import asyncio

import openai
import pytest

from live_server import Running
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams

PROMPT = "Once upon a time"
GREEDY = {"model": "mini", "temperature": 0}


def test_text_and_usage_are_the_engines(client: openai.OpenAI, llm: LLM) -> None:
    (wanted,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=12))
    answer = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=12)
    assert answer.object == "text_completion"
    assert answer.model == "mini"
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, wanted.text, "length")
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_prompts_come_as_text_ids_and_lists_of_each(client: openai.OpenAI, llm: LLM) -> None:
    texts = [PROMPT, "The dog"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    forms = ([PROMPT, ids[0]], [[PROMPT], [ids[0]]], [texts, ids])
    for pair in forms:
        one, other = (
            client.completions.create(**GREEDY, prompt=prompt, max_tokens=5).choices
            for prompt in pair
        )
        assert [c.text for c in one] == [c.text for c in other]
        assert [c.index for c in one] == list(range(len(one)))


def test_choices_of_several_prompts_are_numbered_through(client: openai.OpenAI) -> None:
    choices = client.completions.create(
        model="mini", prompt=["A", "B"], n=2, seed=5, max_tokens=4
    ).choices
    assert [c.index for c in choices] == [0, 1, 2, 3]
    again = client.completions.create(model="mini", prompt="B", n=2, seed=5, max_tokens=4)
    assert [c.text for c in again.choices] == [c.text for c in choices[2:]]


STREAMED = (
    {"prompt": PROMPT, "temperature": 0},
    {"prompt": [PROMPT, "The dog"], "n": 2, "seed": 3},
    {"prompt": PROMPT, "stop": ["girl", "."], "temperature": 0},
    {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0},
    {"prompt": PROMPT, "echo": True, "max_tokens": 0, "logprobs": 1},
    {"prompt": PROMPT, "logprobs": 0, "n": 3, "seed": 1},
    {"prompt": "\U0001f600 \u00e9", "seed": 2, "temperature": 2, "logprobs": 1, "n": 2},
)


@pytest.mark.parametrize("fields", STREAMED)
def test_streamed_or_not_it_is_the_same(client: openai.OpenAI, fields: dict[str, object]) -> None:
    fields = {"model": "mini", "max_tokens": 12, **fields}
    client.completions.create(**fields)  # both then find the prompt in the cache
    whole = client.completions.create(**fields)
    texts: dict[int, str] = {}
    reasons: dict[int, object] = {}
    logprobs: dict[int, dict[str, list[object]]] = {}
    usage = None
    for event in client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = (choice.finish_reason, choice.stop_reason)
            if choice.logprobs:
                joined = logprobs.setdefault(choice.index, {})
                for name, values in choice.logprobs.model_dump().items():
                    joined.setdefault(name, []).extend(values)
    assert texts == {c.index: c.text for c in whole.choices}
    assert reasons == {c.index: (c.finish_reason, c.stop_reason) for c in whole.choices}
    assert logprobs == {c.index: c.logprobs.model_dump() for c in whole.choices if c.logprobs}
    assert usage == whole.usage


def test_utf8_gives_whole_characters(client: openai.OpenAI) -> None:
    fields = {"model": "mini", "prompt": "\u00e9\U0001f600", "temperature": 2, "max_tokens": 30}

    def texts(**more: object) -> list[str]:
        answer = client.completions.create(**fields, n=4, seed=3, extra_body=more)
        return [choice.text for choice in answer.choices]

    assert any("\ufffd" in text for text in texts())
    assert not any("\ufffd" in text for text in texts(utf8=True))
    streamed = [""] * 4
    events = client.completions.create(
        **fields, n=4, seed=3, stream=True, extra_body={"utf8": True}
    )
    for event in events:
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts(utf8=True)


def test_the_async_client_streams_many_at_once(server: Running, llm: LLM) -> None:
    prompts = [f"The {word}" for word in ("dog", "cat", "sun", "boy", "girl", "tree")]
    params = SamplingParams(temperature=0, max_tokens=10)
    wanted = [output.text for output in llm.generate(prompts, params)]

    async def text(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            **GREEDY, prompt=prompt, max_tokens=10, stream=True
        )
        return "".join([event.choices[0].text async for event in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(text(client, prompt) for prompt in prompts))

    assert asyncio.run(main()) == wanted


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("mini", "model")


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as found:
        client.completions.create(model="other", prompt="a")
    assert found.value.param == "model"
    assert found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model="mini", prompt="a", suffix="b")
