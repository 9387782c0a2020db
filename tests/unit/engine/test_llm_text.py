"""`LLM` over a scripted runner: where the text ends, and streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from naive import GREEDY, RULE, V, hashed, naive

from engine_fakes import ByteDecoder, ByteTokenizer, FakeRunner, text_llm, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import EngineError, RequestError

TEXT = "One, two, thrée 🐈 and four.\nFive. One, two."


@pytest.mark.parametrize(
    ("options", "text", "reason", "stop"),
    [
        ({}, TEXT, "stop", None),
        ({"max_tokens": 5}, "One, ", "length", None),
        ({"stop": "two"}, "One, ", "stop", "two"),
        ({"stop": "two", "include_stop": True}, "One, two", "stop", "two"),
        ({"stop": ["zzz", "and f"]}, "One, two, thrée 🐈 ", "stop", "and f"),
        ({"stop": ["🐈"]}, "One, two, thrée ", "stop", "🐈"),
        ({"stop": "é"}, "One, two, thr", "stop", "é"),
        ({"stop": ["two, ", "wo"]}, "One, t", "stop", "wo"),
        ({"stop": ["four.\nFive", "r.\n"]}, "One, two, thrée 🐈 and fou", "stop", "r.\n"),
        ({"stop": "One", "min_tokens": 10}, TEXT[: TEXT.rindex("One")], "stop", "One"),
        ({"stop": "One", "min_tokens": 3}, "", "stop", "One"),
        ({"stop": "One", "min_tokens": 4}, TEXT[: TEXT.rindex("One")], "stop", "One"),
        ({"stop_token_ids": [ord("f") + 3]}, "One, two, thrée 🐈 and ", "stop", ord("f") + 3),
        (
            {"stop_token_ids": [ord("f") + 3], "include_stop": True},
            "One, two, thrée 🐈 and f",
            "stop",
            ord("f") + 3,
        ),
        ({"ignore_eos": True, "max_tokens": 60}, (TEXT + TEXT)[: 60 - 5], "length", None),
        ({"stop": "never"}, TEXT, "stop", None),
        ({"max_tokens": 14}, "One, two, thr\ufffd", "length", None),
        ({"max_tokens": 19, "stop": "x"}, "One, two, thrée \ufffd", "length", None),
    ],
    ids=str,
)
def test_text_ends_where_it_should(
    options: dict[str, Any], text: str, reason: str, stop: str | int | None
) -> None:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 200, **options})
    if "ignore_eos" in options:
        whole = (TEXT.encode() + TEXT.encode())[:59]  # one of the 60 tokens is </s>
        text = whole.decode("utf-8", "replace")
    llm = text_llm(TEXT)
    output = llm.generate("", params)[0]
    assert (output.text, output.finish_reason) == (text, reason)
    assert output.outputs[0].stop_reason == stop
    pieces = list(llm.stream("", params))
    assert "".join(piece.text for piece in pieces) == text
    assert [t for piece in pieces for t in piece.token_ids] == output.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [reason]
    assert pieces[-1].result == output
    if isinstance(stop, str) and "include_stop" not in options and not params.min_tokens:
        assert not any(stop in piece.text for piece in pieces)


def test_stream_never_shows_half_a_character_or_a_piece_of_a_stop_string() -> None:
    llm = text_llm("a🐈b thr é thé end")
    pieces = [p.text for p in llm.stream("", SamplingParams(temperature=0, stop="thé"))]
    assert "".join(pieces) == "a🐈b thr é "
    assert "\ufffd" not in "".join(pieces)
    shown = ""
    for piece in pieces:
        shown += piece
        assert not shown.endswith(("t", "th")) or shown.endswith(" thr é th")


def test_stream_gives_text_before_the_end() -> None:
    stream = text_llm("hello").stream("", SamplingParams(temperature=0))
    assert [next(stream).text for _ in range(3)] == ["h", "e", "l"]


def test_stream_refuses_at_once_and_frees_on_close() -> None:
    llm = text_llm("hello world, again and again")
    with pytest.raises(RequestError):
        llm.stream([2**40])
    with pytest.raises(RequestError, match="best_of"):
        llm.stream("", SamplingParams(best_of=2))
    stream = llm.stream("", SamplingParams(temperature=0))
    next(stream)
    assert llm.has_work
    stream.close()
    assert not llm.has_work
    llm.check_integrity()


def test_two_streams_and_a_generate_interleave() -> None:
    llm = hashed(max_batch_tokens=4)
    one, two = llm.stream([2, 5, 6], GREEDY), llm.stream([9] * 16, GREEDY)
    first = [next(one), next(two)]
    middle = llm.generate([2], GREEDY)[0].token_ids
    ids = [
        [t for p in [start, *rest] for t in p.token_ids]
        for start, rest in zip(first, (one, two), strict=True)
    ]
    assert ids == [naive([2, 5, 6], GREEDY), naive([9] * 16, GREEDY)]
    assert middle == naive([2], GREEDY)


def test_a_stream_that_fails_while_others_run_says_so() -> None:
    def rule(prefix: list[int]) -> np.ndarray:
        return RULE(prefix) * np.float32("nan" if prefix[0] == 9 and len(prefix) > 3 else 1)

    llm = LLM.from_runner(FakeRunner(rule, tiny_config(V)))
    stream = llm.stream([9], GREEDY)
    next(stream)
    llm.generate([2, 5], GREEDY)
    with pytest.raises(EngineError, match="not finite"):
        list(stream)


def test_bytes_after_a_stop_string_stay_hidden() -> None:
    """A token may end in half a character; after a stop string that is nobody's business."""

    class Tailed(ByteTokenizer):
        def decoder(self) -> ByteDecoder:
            decoder = super().decoder()
            decoder.finish = lambda: "TAIL"  # type: ignore[method-assign]
            return decoder

    llm = text_llm("one two")
    llm.tokenizer = Tailed()
    for options, text in (({"stop": " t"}, "one"), ({"stop": "x"}, "one twoTAIL")):
        params = SamplingParams(temperature=0, **options)
        assert llm.generate("", params)[0].text == text
        assert "".join(piece.text for piece in llm.stream("", params)) == text
