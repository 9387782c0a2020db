"""`optlm serve --ray`: two replicas on a local Ray cluster behind one front, one of them killed."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_files import write_lora
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

KEY = {"authorization": "Bearer sk-alice-0123456789"}
STORY = "Once upon a time, there was a little girl named Lily who lived in a big red house. "
LONG = {"prompt": STORY, "max_tokens": 700, "n": 2, "ignore_eos": True, "seed": 5}


class Front:
    """The command as a process, and the processes of its cluster."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "optlm", "serve", "--ray", "--port", "0"]
        self._child = subprocess.Popen(
            [*command, *map(str, arguments)], stderr=subprocess.PIPE, text=True
        )
        self.said = ""
        threading.Thread(target=self._listen, daemon=True).start()
        until(lambda: "serving" in self.said or self._child.poll() is not None, 180)
        port = re.search(r":(\d+)/v1", self.said)
        assert port, self.said
        self.url = f"http://127.0.0.1:{port[1]}"
        until(self._is_ready, 30)

    def processes(self) -> dict[int, str]:
        """Pid to name of the command's descendants."""
        found = {self._child.pid: "front"}
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                text = stat.read_text()
                parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
        for _ in range(4):  # generations: front, raylet, workers
            for pid, parent in parents.items():
                if parent in found and pid not in found:
                    with contextlib.suppress(OSError):
                        found[pid] = Path(f"/proc/{pid}/cmdline").read_text()
        return found

    def replicas(self) -> list[int]:
        return [pid for pid, name in self.processes().items() if "ServeReplica" in name]

    def end(self) -> int:
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
        try:
            return self._child.wait(60)
        finally:
            self._child.kill()
            assert self._child.stderr is not None
            self._child.stderr.close()

    def _listen(self) -> None:
        assert self._child.stderr is not None
        with contextlib.suppress(ValueError):
            for line in self._child.stderr:
                self.said += line

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=30).status_code == 200
        return False


def until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, llm: LLM) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "adapters"
    write_lora(folder / "one", llm.config, 1)
    return folder


@pytest.fixture(scope="module")
def front(adapters: Path) -> Iterator[Front]:
    keys = adapters.parent / "keys"
    keys.write_text("alice sk-alice-0123456789\nbob sk-bob-0123456789abc per_minute=1\n")
    made = Front("--replicas", 2, "--adapters", adapters, "--api-keys", keys)
    try:
        yield made
    finally:
        before = made.processes()
        code = made.end()
    assert code == 0, made.said
    assert "Traceback" not in made.said
    assert len(before) > 4
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before), 30)


@pytest.fixture
def http(front: Front) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=front.url, timeout=120, headers=KEY) as client:
        yield client


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def counted(http: httpx.Client, name: str) -> list[float]:
    """A metric of every replica."""
    page = http.get("/metrics").text
    found = re.findall(rf'^{name}{{model_name="mini-8m",replica="\w+"}} (\S+)$', page, re.MULTILINE)
    return [float(value) for value in found]


def test_the_text_is_that_of_the_plain_server(http: httpx.Client, llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, seed=7)
    for number in range(4):
        prompt = f"{number} dogs ran"
        (alone,) = llm.generate(prompt, params)
        body = {"prompt": prompt, "max_tokens": 20, "seed": 7}
        whole = http.post("/v1/completions", json=body).json()
        assert whole["choices"][0]["text"] == alone.text
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as got:
            assert got.headers["content-type"].startswith("text/event-stream")
            pieces = events(got.iter_lines())
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == alone.text
    assert all(count > 0 for count in counted(http, "vllm:generation_tokens_total"))


def test_the_other_routes(front: Front, http: httpx.Client, adapters: Path, llm: LLM) -> None:
    score = {"context": "The cat sat on the", "continuations": [" mat", " moon"]}
    assert len(http.post("/v1/score", json=score).json()["data"]) == 2
    assert http.post("/v1/embeddings", json={"input": "a"}).json()["data"][0]["embedding"]
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=chat).json()["object"] == "chat.completion"
    assert http.post("/tokenize", json={"prompt": "Hi"}).json()["tokens"] == llm.tokenizer.encode(
        "Hi"
    )
    assert "one" in [model["id"] for model in http.get("/v1/models").json()["data"]]
    assert http.get("/v1/models/one").json()["parent"] == "mini-8m"
    assert "playground" in http.get("/").text
    write_lora(adapters / "two", llm.config, 2)
    assert http.post("/v1/adapters/reload").json()["loaded"] == ["two"]
    texts = {
        http.post(
            "/v1/completions", json={"prompt": f"{n}", "model": name, "max_tokens": 9, "seed": 1}
        ).json()["choices"][0]["text"]
        for name in ("mini-8m", "one", "two")
        for n in range(2)  # one replica each
    }
    assert len(texts) == 6


def test_refusals_have_the_servers_shape(front: Front, http: httpx.Client) -> None:
    for path, body, status, param in (
        ("completions", {"promt": "a"}, 400, "promt"),
        ("completions", {"prompt": "a", "model": "none"}, 404, "model"),
        ("completions", {"prompt": ["a"] * 1024, "n": 128, "max_tokens": 900}, 400, None),
        ("nothing", {}, 404, None),
    ):
        answer = http.post(f"/v1/{path}", json=body)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["message"]
        assert error["param"] == param
    assert http.post("/v1/completions", content=b"x" * 2**23 + b"x").status_code == 415
    kind = {"content-type": "application/json"}
    assert http.post("/v1/completions", content=b" " * 2**24, headers=kind).status_code == 413
    with httpx.Client(base_url=front.url, timeout=30) as stranger:
        assert stranger.get("/v1/models").status_code == 401
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/health").json() == {"status": "ok"}
        bob = {"authorization": "Bearer sk-bob-0123456789abc"}
        body = {"prompt": "a", "max_tokens": 1}
        codes = [
            stranger.post("/v1/completions", json=body, headers=bob).status_code for _ in range(3)
        ]
        assert codes == [200, 429, 429]  # whichever replica would have answered


def test_a_prefix_stays_with_its_replica(http: httpx.Client) -> None:
    before = counted(http, "vllm:prompt_tokens_total")
    for number in range(8):
        body = {"prompt": f"{STORY * 3} {number}", "max_tokens": 1}
        usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 48
    after = counted(http, "vllm:prompt_tokens_total")
    assert sorted(now > then for now, then in zip(after, before, strict=True)) == [False, True]


def test_who_leaves_ends_the_work(http: httpx.Client) -> None:
    for stream in (True, False):
        body = {**LONG, "n": 64, "stream": stream}
        with contextlib.suppress(httpx.ReadTimeout):
            if stream:
                with http.stream("POST", "/v1/completions", json=body) as got:
                    next(got.iter_lines())
            else:
                http.post("/v1/completions", json=body, timeout=0.5)
        until(lambda: sum(counted(http, "vllm:num_requests_running")) == 0, 20)
        assert sum(counted(http, "vllm:num_requests_waiting")) == 0


def test_nobody_else_can_reach_it(front: Front) -> None:
    """Every port that a process of the cluster listens on is of loopback."""
    inodes = set()
    for pid in front.processes():
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()))
    listening = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in inodes:
                listening.add(words[1].partition(":")[0])
    loopback = socket.inet_aton("127.0.0.1")[::-1].hex().upper()
    assert loopback in listening
    assert listening <= {loopback, "0000000000000000FFFF0000" + loopback}


def test_a_killed_replica(front: Front, http: httpx.Client, llm: LLM) -> None:
    prompts = [f"{number} {STORY}" for number in range(4)]
    params = SamplingParams(max_tokens=700, ignore_eos=True, seed=5, n=2)
    alone = llm.generate(prompts[:2], params)
    replicas = front.replicas()
    assert len(replicas) == 2

    def whole(number: int) -> httpx.Response:
        return http.post("/v1/completions", json={**LONG, "prompt": prompts[number]})

    def streamed(number: int) -> list[dict[str, Any]]:
        body = {**LONG, "prompt": prompts[number], "n": 6, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as got:
            assert got.status_code == 200
            begun.append(number)
            return events(got.iter_lines())

    begun: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(streamed, number) for number in range(4)]
        until(lambda: len(begun) == 4, 30)
        answers = [pool.submit(whole, number) for number in range(2)]
        time.sleep(0.3)
        subprocess.run(["kill", "-9", str(replicas[0])], check=True)
        ends = [stream.result(60)[-1] for stream in streams]
        for answer, output in zip(answers, alone, strict=True):  # one of them was asked again
            choices = answer.result(60).json()["choices"]
            assert [choice["text"] for choice in choices] == [out.text for out in output.outputs]
    lost = [end["error"] for end in ends if "error" in end]
    assert 0 < len(lost) < 4
    assert {error["code"] for error in lost} == {"replica_lost"}
    assert {error["type"] for error in lost} == {"unavailable_error"}
    assert http.get("/health").status_code == 200
    assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
    until(lambda: len(set(front.replicas()) - {replicas[0]}) == 2, 60)
