"""An engine under the load of many clients, in a process of its own and without HTTP.

Runs with the Python of the engine's environment: JSON lines on standard input, one line back for
each. Clients are simulated: each asks again the moment its answer is complete.

    {"op": "load", "folder": ..., "threads": 2}                     -> {"packages": {...}}
    {"op": "load_up", "clients": 8, "prompts": [[...]], "tokens": 64}
        -> {"seconds": 4.1, "first": [0.05, ...]}     first: seconds to each request's first token
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import metadata
from typing import Any

TokenLists = list[list[int]]


class Optlm:
    """`LLM.submit` and `LLM.step` in one thread: the bare engine."""

    packages = ("numpy",)

    def load(self, folder: str, threads: int) -> None:
        from optlm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(folder, dtype="int8", threads=threads)

    def load_up(self, clients: int, prompts: TokenLists, tokens: int) -> list[float]:
        params = self.params(temperature=0, max_tokens=tokens, ignore_eos=True)
        waiting, running, first = list(reversed(prompts)), [], []
        while waiting or running:
            while waiting and len(running) < clients:
                job = self.llm.submit(waiting.pop(), params)
                running.append([job, time.perf_counter(), False])
            self.llm.step()
            for entry in running:
                job, begun, seen = entry
                request = job.samples[0].request
                if not seen and len(request.tokens) > request.num_prompt:
                    first.append(time.perf_counter() - begun)
                    entry[2] = True
            running = [entry for entry in running if not entry[0].finished]
        return first


class OpenVINO:
    """The continuous-batching pipeline of OpenVINO GenAI, which OpenVINO Model Server stands on."""

    packages = ("openvino", "openvino-genai")

    def load(self, folder: str, threads: int) -> None:
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.dynamic_split_fuse = True
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = False
        self.genai = genai
        self.pipeline = genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.sent = 0

    def load_up(self, clients: int, prompts: TokenLists, tokens: int) -> list[float]:
        waiting, running, first = list(reversed(prompts)), [], []
        while waiting or running:
            while waiting and len(running) < clients:
                running.append([self.ask(waiting.pop(), tokens), time.perf_counter(), 0])
            self.pipeline.step()
            for entry in running:
                handle, begun, _ = entry
                while handle.can_read():
                    new = sum(len(output.generated_ids) for output in handle.read().values())
                    if not entry[2] and new:
                        first.append(time.perf_counter() - begun)
                    entry[2] += new
            running = [entry for entry in running if entry[2] < tokens]
        return first

    def ask(self, prompt: list[int], tokens: int) -> Any:
        import numpy as np
        import openvino

        config = self.genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        self.sent += 1
        ids = openvino.Tensor(np.array([prompt], np.int64))
        return self.pipeline.add_request(self.sent, ids, config)


ENGINES = {"optlm": Optlm, "openvino": OpenVINO}


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    if op == "load":
        engine.load(**request)
        return {"packages": {name: metadata.version(name) for name in engine.packages}}
    start = time.perf_counter()
    first = engine.load_up(**request)
    return {"seconds": time.perf_counter() - start, "first": first}


def main() -> None:
    engine = ENGINES[sys.argv[1]]()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    for line in sys.stdin:
        try:
            reply = answer(engine, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
