"""What `optlm serve --ray` is made of, without Ray: replicas, choices, options."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_files import write_lora
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.errors import RequestError
from optlm.serve.cluster.beginnings import Chooser, Readers, beginnings
from optlm.serve.cluster.options import ClusterOptions
from optlm.serve.cluster.replica import Head, Replica, ReplicaOptions
from optlm.serve.limits import Limits
from variants import VARIANTS, make_state, write_checkpoint


def made(**fields: object) -> list[bytes]:
    return beginnings(json.dumps(fields).encode())


def test_what_requests_begin_with() -> None:
    text = "".join(f"word{number} " for number in range(40))
    names = made(prompt=text)
    assert len(names) == len(text) // 64
    assert made(prompt=text + "more")[: len(names)] == names
    other = made(prompt=text[:150] + "X" + text[151:])
    assert [a == b for a, b in zip(names, other, strict=True)] == [True] * 2 + [False] * 2
    assert made(prompt=[text, "x"]) == made(context=text) == made(input=[text]) == names
    assert not set(made(prompt=text, model="other")) & set(names)
    assert len(made(prompt=list(range(40)))) == len(made(prompt=[list(range(40))])) == 2
    turns = [{"role": "user", "content": text}]
    assert made(messages=[*turns, {"role": "user", "content": "x"}])[:4] == made(messages=turns)[:4]
    assert len(made(prompt="x" * 2**20)) == 128


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", b"{", b"[]", b"1", b"[" * 10**5, b'{"prompt": 5}', b'{"prompt": [[]]}',
        b'{"prompt": {"a": 1}}', b'{"prompt": [-1, 2]}', b'{"prompt": [1.5]}', b'{"model": []}',
        b'{"prompt": "short"}', b'{"prompt": "\\ud800"}', b'{"messages": {}}',
    ],
)  # fmt: skip
def test_what_is_no_request_has_no_beginning(body: bytes) -> None:
    assert beginnings(body) == []


def test_readers_that_are_gone_or_forgotten() -> None:
    readers = Readers(known=3)
    readers.note([b"1", b"2"], "a")
    readers.note([b"1", b"3"], "b")
    assert readers.find([b"1", b"2"], {"a", "b"}) == "a"
    assert readers.find([b"1", b"2"], {"b"}) == "b"
    assert readers.find([b"1", b"4"], {"a", "b"}) == "b"
    assert readers.find([b"4"], {"a"}) is None
    readers.note([b"5"], "a")
    assert readers.find([b"2"], {"a"}) is None


def test_choices() -> None:
    chooser, loads = Chooser(), {"a": 0, "b": 0, "c": 0}
    firsts = [chooser.order([], loads)[0] for _ in range(6)]
    assert sorted(firsts[:3]) == sorted(firsts[3:]) == ["a", "b", "c"]
    assert chooser.order([], {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    home = chooser.order([b"1"], loads)[0]
    for _ in range(5):
        assert chooser.order([b"1", b"2"], loads)[0] == home
    assert chooser.order([b"1"], {**loads, home: 8})[0] == home
    other = chooser.order([b"1"], {**loads, home: 9})[0]
    assert other != home
    assert chooser.order([b"1"], loads)[0] == other
    rest = {name: 0 for name in loads if name != other}
    assert chooser.order([b"1"], rest)[0] in rest


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_replica(variant: str, tmp_path: Path) -> None:
    """Its answers are the engine's, whole and streamed, for the model and its adapter."""
    config = VARIANTS[variant]
    folder = write_checkpoint(tmp_path / "model", config, make_state(config))
    write_lora(tmp_path / "adapters" / "one", config, 1)
    llm = LLM(folder, threads=1)
    llm.load_adapter("one", tmp_path / "adapters" / "one")
    options = ReplicaOptions(
        load=lambda: LLM(folder, threads=1),
        name="tiny",
        adapters=tmp_path / "adapters",
        limits=Limits(),
        loopback=False,
    )

    async def ask(replica: Replica, **body: object) -> list[object]:
        raw = json.dumps(body).encode()
        return [part async for part in replica.answer([], "POST", "/v1/completions", raw)]

    async def run() -> None:
        replica = Replica(options)
        await replica.reconfigure({})
        for name in (None, "one"):
            (alone,) = llm.generate("the cat", SamplingParams(max_tokens=9, seed=1, adapter=name))
            body = {"prompt": "the cat", "max_tokens": 9, "seed": 1, "model": name or "tiny"}
            taken, head, *parts = await ask(replica, **body)
            assert taken is None
            assert isinstance(head, Head)
            assert head.status == 200
            whole = json.loads(b"".join(part for part in parts if isinstance(part, bytes)))
            assert whole["choices"][0]["text"] == alone.text
            _, _, *parts = await ask(replica, **body, stream=True)
            streamed = b"".join(part for part in parts if isinstance(part, bytes)).decode()
            pieces = [json.loads(line[6:]) for line in streamed.split("\n\n") if line[6:7] == "{"]
            assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone.text
            assert streamed.endswith("data: [DONE]\n\n")
        await replica.check_health()
        replica._engine.close()
        with pytest.raises(Exception, match="engine was closed"):
            await replica.check_health()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"least": 0}, "least is 0"),
        ({"most": 0}, "most is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"least": 3, "most": 2}, "at most 2 replicas are less than the 3"),
    ],
)
def test_options_out_of_range(values: dict[str, int], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        ClusterOptions(**values)  # type: ignore[arg-type]


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    for words, told in (
        (["--replicas", "2"], "--replicas goes with --ray"),
        (["--ray-address", "auto"], "--ray-address goes with --ray"),
        (["--ray", "--replicas", "x"], "must be a number, or two as in 1:4"),
        (["--ray", "--replicas", "3:2"], "at most 2 replicas are less than the 3"),
        (["--ray", "--replicas", "0"], "least is 0"),
        (["--ray", "--threads", "0"], "threads is 0"),
        (["--ray", "--model", str(tmp_path / "nowhere")], "nowhere"),
    ):
        command = [sys.executable, "-m", "optlm", "serve", "--port", "0", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from optlm import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "serve", "--ray", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "pip install 'optlm[ray]'" in done.stderr
