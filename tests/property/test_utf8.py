"""UTF-8-legal decoding: what a random model writes always decodes, whatever the sampling."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fakes import ByteTokenizer, FakeRunner, hashed_logits, tiny_config
from optlm import LLM, SamplingParams
from optlm.engine.utf8 import BROKEN, Utf8Table, advance
from optlm.errors import RequestError
from optlm.tokenizer.incremental import ByteDecoder
from variants import VARIANTS, make_state, write_checkpoint


class Chunks:
    """Ids 0 to 3 are special, the rest stand for the byte strings given."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.chunks = list(chunks)

    def is_special(self, token_id: int, /) -> bool:
        return token_id < 4

    def token_bytes(self, token_id: int, /) -> bytes:
        return b"<s>" if token_id < 4 else self.chunks[token_id - 4]

    def shown(self, token_id: int) -> bytes:
        return b"" if token_id < 4 else self.chunks[token_id - 4]

    def encode(self, text: str, /) -> list[int]:
        return [2]

    def decode(self, ids: Iterable[int], /) -> str:
        return b"".join(map(self.shown, ids)).decode("utf-8", "replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder(self.shown)


def parts(text: str) -> st.SearchStrategy[bytes]:
    """Pieces of real text, cut anywhere."""
    data = text.encode()
    return st.builds(
        lambda start, length: data[start : start + length],
        st.integers(0, len(data) - 1),
        st.integers(1, 6),
    )


chunk = st.one_of(parts("aé€😀ࠀ퟿𐀀􏿿\x7f߿"), st.binary(min_size=0, max_size=4))
vocabularies = st.lists(chunk, min_size=1, max_size=40)
sampling = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.5, 3.0]),
        "top_k": st.integers(1, 9),
        "top_p": st.sampled_from([0.3, 0.9]),
        "min_p": st.sampled_from([0.05, 0.5]),
        "repetition_penalty": st.sampled_from([0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 1.0]),
        "logit_bias": st.dictionaries(st.integers(3, 5), st.sampled_from([-1e4, 1e4])),
        "stop": st.sampled_from(["a", "é", "€a"]),
        "stop_token_ids": st.lists(st.integers(3, 5), max_size=2),
        "include_stop": st.booleans(),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 3),
        "logprobs": st.integers(0, 3),
        "n": st.integers(1, 2),
    },
)


def run(tokenizer: Chunks, params: SamplingParams, context: int = 24) -> list[Any]:
    vocab_size = 4 + len(tokenizer.chunks)
    runner = FakeRunner(hashed_logits(vocab_size), tiny_config(vocab_size, context))
    return LLM.from_runner(runner, tokenizer).generate([2], params)[0].outputs


@settings(max_examples=150, deadline=None)
@given(vocabularies, sampling, st.integers(3, 30), st.integers(0, 99))
def test_what_a_random_model_writes_decodes(
    chunks: list[bytes], options: dict[str, Any], max_tokens: int, seed: int
) -> None:
    tokenizer = Chunks([b"a", *chunks])
    params = SamplingParams(**options, max_tokens=max_tokens, seed=seed, utf8=True)
    for output in run(tokenizer, params):
        assert "�" not in output.text or any("�".encode() in c for c in chunks)
        if not output.stop_reason:  # a stop string may end inside a token
            data = b"".join(map(tokenizer.shown, output.token_ids))
            assert data.decode() == output.text or params.stop
        assert output.logprobs is None or len(output.logprobs) == len(output.token_ids)


def can_go_on(data: bytes) -> bool:
    """Whether some bytes after it make it UTF-8."""
    ends = (bytes(end) for n in range(4) for end in product((0x80, 0x90, 0xA0, 0xBF), repeat=n))
    for end in ends:
        try:
            (data + end).decode()
        except UnicodeDecodeError:
            continue
        return True
    return False


@given(st.lists(st.sampled_from("aé€😀"), max_size=2), st.binary(max_size=4))
def test_states_are_those_of_a_strict_decoder(before: list[str], data: bytes) -> None:
    data = "".join(before).encode() + data
    assert (advance(0, data) != BROKEN) == can_go_on(data)


def test_every_pair_of_bytes() -> None:
    for data in (bytes([a, b]) for a in range(0x7E, 256) for b in range(0x7C, 0xC4)):
        assert (advance(0, data) != BROKEN) == can_go_on(data)
        assert (advance(0, data) == 0) == (data.decode("utf-8", "ignore").encode() == data)


def test_a_character_is_begun_only_if_it_can_be_ended() -> None:
    """Three one-byte tokens make a euro sign; with two tokens left, none is begun."""
    tokenizer = Chunks([b"a", *(bytes([b]) for b in "€".encode())])
    bias = {5: 100.0, 4: 50.0}
    params = {"temperature": 0, "utf8": True, "ignore_eos": True, "logit_bias": bias}
    for count, text in ((1, "."), (2, ".."), (3, "€"), (5, "€.."), (6, "€€")):
        (output,) = run(tokenizer, SamplingParams(max_tokens=count, **params))
        assert len(output.text) == len(text)
        assert output.text.count("a") == text.count(".")
    (output,) = run(tokenizer, SamplingParams(max_tokens=99, **params), context=24)
    assert output.finish_reason == "length"
    assert (len(output.text), output.text.count("a")) == (9, 2)  # 23 tokens fit the context
    assert "�" not in output.text


def test_a_character_that_no_token_ends_is_never_begun() -> None:
    tokenizer = Chunks([b"a", b"\xf0", b"\x82"])
    params = SamplingParams(temperature=0, utf8=True, max_tokens=20, logit_bias={5: 1e3})
    (output,) = run(tokenizer, params)
    assert set(output.token_ids) <= {0, 1, 2, 3, 4}


def test_it_changes_nothing_where_nothing_is_broken() -> None:
    tokenizer = Chunks([b"a", b"b", "é".encode()])
    for options in ({"temperature": 0}, {"seed": 5}, {"seed": 6, "top_k": 3}):
        plain, legal = (run(tokenizer, SamplingParams(**options, utf8=on)) for on in (False, True))
        assert plain[0].token_ids == legal[0].token_ids


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_on_every_variant(tmp_path: Path, variant: str) -> None:
    config = VARIANTS[variant]
    folder = write_checkpoint(tmp_path, config, make_state(config))
    backends = ["native", "torch"]
    params = [SamplingParams(seed=i, max_tokens=20, utf8=True) for i in range(6)]
    params += [SamplingParams(temperature=0, max_tokens=20, utf8=True, logprobs=2)]
    results = []
    for backend in backends:
        llm = LLM(folder, backend=backend, threads=1, dtype="f32")  # type: ignore[arg-type]
        outputs = llm.generate(["the cat"] * len(params), params)
        assert all("�" not in output.text for output in outputs)
        results.append([output.token_ids for output in outputs])
        pieces = list(llm.stream("the cat", params[0]))
        assert "".join(piece.text for piece in pieces) == outputs[0].text
        plain = llm.generate("the cat", SamplingParams(seed=0, max_tokens=20))[0]
        assert "�" in plain.text  # a random model breaks characters
    assert results[0] == results[1]


def test_what_is_refused() -> None:
    config = tiny_config(300)
    fake = FakeRunner(hashed_logits(300), config)
    params = SamplingParams(utf8=True)
    with pytest.raises(RequestError, match="utf8 needs a tokenizer"):
        LLM.from_runner(fake).generate([2], params)
    with pytest.raises(RequestError, match="utf8 needs a tokenizer that tells the bytes"):
        LLM.from_runner(fake, ByteTokenizer()).generate([2], params)
    with pytest.raises(RequestError, match="none that is whole characters"):
        Utf8Table(Chunks([b"\x80"] * 4), 5).masks(frozenset({0, 1, 2, 3}))
    with pytest.raises(RequestError, match="utf8 must be True or False"):
        SamplingParams(utf8="yes")  # type: ignore[arg-type]
    for search in ({"beam_width": 2}, {"penalty_alpha": 0.5, "top_k": 3}):
        with pytest.raises(RequestError, match="does not combine with utf8"):
            SamplingParams(temperature=0, utf8=True, **search)


def test_masks_remove_and_keep_exactly() -> None:
    table = Utf8Table(Chunks([b"a", b"\xc3", b"\xa9", "é".encode()]), 8)
    masks = table.masks(frozenset({2}))
    for state, left, wanted in (
        (0, 0, {0, 1, 2, 3, 4, 7}),
        (0, 1, {0, 1, 2, 3, 4, 5, 7}),
        (1, 0, {6}),
    ):
        row = np.arange(8, dtype=np.float32)
        masks.apply(row, state, left)
        assert set(np.flatnonzero(np.isfinite(row)).tolist()) == wanted
        assert all(row[i] == i for i in wanted)
    assert table.masks(frozenset({2})) is masks
