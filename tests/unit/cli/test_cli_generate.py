"""`optlm generate`, on tiny checkpoints of every variant."""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_run import Run

from optlm import LLM, SamplingParams
from optlm.cli.generate import add_options
from optlm.engine.outputs import StreamOutput
from variants import VARIANTS

GREEDY = ("--temperature", 0, "--max-tokens", 12, "--threads", 1)


@pytest.fixture(scope="session")
def llm(models: dict[str, Path]) -> LLM:
    return LLM(models["base"], threads=1)


# ---- text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_is_the_engine_s(run: Run, models: dict[str, Path], variant: str) -> None:
    result = run("generate", "the cat", "-m", models[variant], *GREEDY)
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = LLM(models[variant], threads=1).generate("the cat", params)[0].text
    assert result == (0, expected + "\n", "")


@pytest.mark.parametrize("flag", ["--stream", "--no-stream"])
def test_streaming_changes_nothing_in_the_end(run: Run, base: Path, llm: LLM, flag: str) -> None:
    params = SamplingParams(seed=4, max_tokens=30)
    expected = llm.generate("the cat", params)[0].text
    result = run(
        "generate", "the cat", "-m", base, "--seed", 4, "--max-tokens", 30, "--threads", 1, flag
    )
    assert result.out == expected + "\n"


def test_prompt_from_file_and_standard_input(run: Run, base: Path, tmp_path: Path) -> None:
    expected = run("generate", "the cat", "-m", base, *GREEDY).out
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfthe cat\r\n")
    assert run("generate", "--file", file, "-m", base, *GREEDY).out == expected
    assert run("generate", "-", "-m", base, *GREEDY, stdin=b"the cat\n").out == expected


def test_no_prompt_begins_a_text(run: Run, base: Path, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    assert run("generate", "-m", base, *GREEDY).out == llm.generate("", params)[0].text + "\n"


def test_several_prompts_are_titled(run: Run, base: Path) -> None:
    result = run("generate", "-", "--lines", "-n", 2, "-m", base, "--seed", 1, stdin=b"the\ncat\n")
    titles = re.findall("^==> (.*) <==$", result.out, re.MULTILINE)
    assert titles == [
        "prompt 1, text 1",
        "prompt 1, text 2",
        "prompt 2, text 1",
        "prompt 2, text 2",
    ]


@pytest.mark.parametrize("options", [("--beam", 3), ("--contrastive", 0.6, "--top-k", 4)])
def test_searches_are_greedy_without_being_told(
    run: Run, base: Path, llm: LLM, options: tuple[Any, ...]
) -> None:
    search: dict[str, Any] = (
        {"beam_width": 3} if options[0] == "--beam" else {"penalty_alpha": 0.6, "top_k": 4}
    )
    params = SamplingParams(temperature=0, max_tokens=8, **search)
    expected = llm.generate("the cat", params)[0].text
    result = run("generate", "the cat", "-m", base, "--max-tokens", 8, "--threads", 1, *options)
    assert result.out == expected + "\n"


def test_best_of(run: Run, base: Path, llm: LLM) -> None:
    params = SamplingParams(best_of=4, seed=3, max_tokens=8)
    expected = llm.generate("the cat", params)[0].text
    options = ("--best-of", 4, "--seed", 3, "--max-tokens", 8, "--threads", 1)
    assert run("generate", "the cat", "-m", base, *options).out == expected + "\n"


def test_verbose_talks_on_stderr_only(run: Run, base: Path) -> None:
    quiet = run("generate", "the cat", "-m", base, *GREEDY)
    loud = run("generate", "the cat", "-m", base, *GREEDY, "-v")
    assert loud.out == quiet.out
    assert re.match(r"optlm: \d+ tokens \(\w+\), first after \d+ ms", loud.err)


# ---- JSON ---------------------------------------------------------------------------------------


def test_json_lines(run: Run, base: Path, llm: LLM) -> None:
    result = run("generate", "-", "--lines", "-m", base, *GREEDY, "--json", stdin=b"the cat\na\n")
    records = [json.loads(line) for line in result.out.splitlines()]
    outputs = llm.generate(["the cat", "a"], SamplingParams(temperature=0, max_tokens=12))
    for record, output in zip(records, outputs, strict=True):
        prompt, new = len(output.prompt_token_ids), len(output.token_ids)
        assert record == {
            "prompt": output.prompt,
            "index": 0,
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": new,
                "total_tokens": prompt + new,
            },
        }


def test_json_log_probabilities(run: Run, base: Path) -> None:
    result = run("generate", "the", "-m", base, *GREEDY, "--json", "--logprobs", 3)
    record = json.loads(result.out)
    assert len(record["logprobs"]) == len(record["token_ids"])
    for entry, token in zip(record["logprobs"], record["token_ids"], strict=True):
        assert entry["id"] == token
        assert len(entry["top"]) == 3
        assert entry["logprob"] == entry["top"][0]["logprob"] <= 0  # greedy takes the first


def test_seed_that_was_drawn_is_told(run: Run, base: Path) -> None:
    first = json.loads(run("generate", "the", "-m", base, "--json", "--threads", 1).out)
    again = run("generate", "the", "-m", base, "--json", "--threads", 1, "--seed", first["seed"])
    assert json.loads(again.out) == first


# ---- options ------------------------------------------------------------------------------------

# `adapter` names a loaded one; the option --adapter is a folder, merged when the model loads.
_PYTHON_ONLY = {"prompt_logprobs", "stop_token_ids", "adapter"}


def test_every_sampling_parameter_has_its_option_and_default() -> None:
    parser = ArgumentParser()
    add_options(parser)
    told = {action.dest: action.help or "" for action in parser._actions}
    fields = [f for f in dataclasses.fields(SamplingParams) if f.name not in _PYTHON_ONLY]
    assert {field.name for field in fields} <= set(told)
    shown = {
        field.name: (default[1], str(field.default))
        for field in fields
        if (default := re.search(r"\(([^()]*)\)$", told[field.name]))
    }
    assert len(shown) >= 11
    assert all(ours == theirs for ours, theirs in shown.values()), shown


def test_options_reach_the_engine(run: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingParams] = []

    def stream(self: LLM, prompt: str, params: SamplingParams) -> Iterator[StreamOutput]:
        seen.append(params)
        return iter(())

    monkeypatch.setattr(LLM, "stream", stream)
    given: dict[str, Any] = {
        "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "seed": 11, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "on_overflow": "truncate_left",
    }  # fmt: skip
    flags = [x for name, value in given.items() for x in (f"--{name.replace('_', '-')}", value)]
    run(
        "generate", "x", "-m", base, *flags, "--stop", r"a\n", "--stop", "b", "--include-stop",
        "--ignore-eos", "--logit-bias", "50=-2.5",
    )  # fmt: skip
    expected = SamplingParams(
        **given, stop=("a\n", "b"), include_stop=True, ignore_eos=True, logit_bias={50: -2.5}
    )
    assert seen == [expected]


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--file", "y"), "a prompt or --file, not both"),
        (("x", "--lines"), "--lines reads --file or -"),
        (("x", "--logprobs", 2), "--logprobs needs --json"),
        (("x", "--json", "--stream"), "--stream shows one text"),
        (("x", "-n", 2, "--stream"), "--stream shows one text"),
        (("x", "--logit-bias", "fifty"), "not ID=VALUE"),
        (("x", "--temperature", "nan"), "temperature"),
        (("x", "--top-p", 1.5), "top_p"),
        (("x", "--max-tokens", -1), "max_tokens"),
        (("x", "--max-tokens", "many"), "--max-tokens"),
        (("x", "--nonsense"), "unknown option --nonsense"),
        (("x", "--max-token=3"), "unknown option --max-token; did you mean '--max-tokens'?"),
        (("once", "upon", "a"), "'upon a' is one argument too many"),
        (("x", "--dtype", "int3"), "int3"),
        (("x", "--threads", 0), "threads"),
        (("x" * 300,), "context"),
        (("--file", "no-such-file"), "no-such-file: No such file"),
        (("-m", "no/such/model", "x"), "neither a folder nor a hub name"),
    ],
)
def test_bad_use_is_told_in_few_words(
    run: Run, base: Path, arguments: tuple[Any, ...], message: str
) -> None:
    result = run("generate", "-m", base, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) <= 4
    assert "Traceback" not in result.err


def test_input_that_is_no_utf8(run: Run, base: Path) -> None:
    result = run("generate", "-", "-m", base, stdin=b"ab\xff")
    assert result.code == 2
    assert "standard input is not UTF-8 (byte 2)" in result.err


def test_faults_of_our_own_hide_their_traceback(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("engine on fire")

    monkeypatch.setattr(LLM, "stream", fail)
    result = run("generate", "x", "-m", base)
    assert result.code == 1
    assert result.err.startswith("optlm: error: ZeroDivisionError: engine on fire\n")
    with pytest.raises(ZeroDivisionError):
        run("--debug", "generate", "x", "-m", base)


def test_interrupt_keeps_what_was_generated(
    run: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(self: LLM, prompt: str, params: SamplingParams) -> Iterator[StreamOutput]:
        yield StreamOutput(index=0, text="half a sen", token_ids=[5])
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", stream)
    for flag in ("--stream", "--no-stream"):
        assert run("generate", "x", "-m", base, flag) == (130, "half a sen\n", "")
