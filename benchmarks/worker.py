"""One engine in a process of its own: JSON lines on standard input, one JSON line back for each.

Runs with the Python of the engine's own environment, so it imports nothing of this repository but
`optlm` itself, and that only for our engine. Every engine takes token ids and returns token ids, so
no tokenizer is timed.

    {"op": "load", "folder": ..., "form": "int8", "threads": 2, "batch_tokens": 512}
        -> {"seconds": 1.2, "packages": {...}}
    {"op": "generate", "prompts": [[...]], "tokens": 33} -> {"seconds": 0.4, "tokens": [[...]]}
    {"op": "score", "windows": [[...]]} -> {"seconds": 0.4, "totals": [...]}: ours and transformers
    {"op": "memory"} -> {"peak": ..., "resident": ...}
    {"op": "facts"}, {"op": "skip_zeros", "on": true}, {"op": "hash_logits", ...}: our engine only
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
TokenLists = list[list[int]]


class Engine(Protocol):
    @property
    def packages(self) -> tuple[str, ...]:
        """Packages whose versions go into the results."""
        ...

    def load(self, folder: str, form: str, threads: int, batch_tokens: int) -> None:
        """`batch_tokens`: tokens one pass may carry, for an engine that cuts prompts up."""
        ...

    def generate(self, prompts: TokenLists, tokens: int) -> TokenLists:
        """Continue every prompt greedily by exactly `tokens` tokens, `</s>` or not."""
        ...


class Optlm:
    packages = ("numpy",)

    def load(self, folder: str, form: str, threads: int, batch_tokens: int) -> None:
        from optlm.checkpoint import open_checkpoint
        from optlm.engine.llm import LLM
        from optlm.engine.runner import RunnerOptions, make_runner

        options = RunnerOptions(
            dtype=cast(Any, form), threads=threads, backend="native", max_batch_tokens=batch_tokens
        )
        self.runner: Any = make_runner(open_checkpoint(folder), options)
        self.llm = LLM.from_runner(self.runner, prefix_cache=False)

    def generate(self, prompts: TokenLists, tokens: int) -> TokenLists:
        from optlm.engine.params import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return [output.token_ids for output in self.llm.generate(prompts, params)]

    def score(self, windows: TokenLists) -> list[float]:
        """Log-probability of each window, its first token given."""
        from optlm.score import Scorer

        scorer = Scorer(self.llm, convention="gptq", window=len(windows[0]))
        return [scored.total for scored in scorer.tokens(windows)]

    def facts(self) -> dict[str, Any]:
        """Counts of the core; the active share is that of the steps since the last call."""
        core, config = self.runner.core, self.runner.config
        share = core.active_share()
        return {
            "instruction_set": core.instruction_set,
            "bytes_per_token": core.bytes_per_token,
            "fc2_weights": config.num_hidden_layers * config.hidden_size * config.ffn_dim,
            "active_share": share if share == share else None,  # NaN: nothing is skipped
        }

    def skip_zeros(self, on: bool) -> None:
        self.runner.core.set_skip_zeros(on)

    def hash_logits(self, prompts: TokenLists, tokens: int) -> str:
        """Generate, and return a digest over the bits of all logits of all steps."""
        digest = hashlib.sha256()
        forward = self.runner.forward

        def hashing(*arrays: Any) -> Any:
            logits = forward(*arrays)
            digest.update(logits.tobytes())
            return logits

        self.runner.forward = hashing
        try:
            self.generate(prompts, tokens)
        finally:
            self.runner.forward = forward
        return digest.hexdigest()


class Transformers:
    packages = ("transformers", "torch")

    def load(self, folder: str, form: str, threads: int, batch_tokens: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[form]
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: TokenLists, tokens: int) -> TokenLists:
        import torch

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=1,
            )
        result: TokenLists = out[:, ids.shape[1] :].tolist()
        return result

    def score(self, windows: TokenLists) -> list[float]:
        import torch

        totals = []
        for window in windows:
            ids = torch.tensor([window])
            with torch.inference_mode():
                logits = self.model(ids).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            totals.append(-loss.item())
        return totals


class CTranslate2:
    packages = ("ctranslate2",)

    def load(self, folder: str, form: str, threads: int, batch_tokens: int) -> None:
        import ctranslate2

        compute = {"int8": "int8_float32", "f32": "float32"}[form]
        self.generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
        )
        self.words = json.loads((Path(folder) / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: TokenLists, tokens: int) -> TokenLists:
        results = self.generator.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            min_length=tokens,  # forbids the end token
            max_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]


class OpenVINO:
    packages = ("openvino", "openvino-genai", "optimum-intel")

    def load(self, folder: str, form: str, threads: int, batch_tokens: int) -> None:
        import openvino_genai

        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompts: TokenLists, tokens: int) -> TokenLists:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array(prompts, np.int64))
        mask = openvino.Tensor(np.ones((len(prompts), len(prompts[0])), np.int64))
        inputs = openvino_genai.TokenizedInputs(ids, mask)
        return [list(tokens) for tokens in self.pipeline.generate(inputs, config).tokens]


ENGINES: dict[str, type[Engine]] = {
    "optlm": Optlm,
    "transformers": Transformers,
    "ctranslate2": CTranslate2,
    "openvino": OpenVINO,
}


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Do one request."""
    start = time.perf_counter()
    op = request.pop("op")
    if op == "load":
        engine.load(**request)
        versions = {name: metadata.version(name) for name in engine.packages}
        return {"seconds": time.perf_counter() - start, "packages": versions}
    if op == "generate":
        tokens = engine.generate(request["prompts"], request["tokens"])
        seconds = time.perf_counter() - start
        if [len(row) for row in tokens] != [request["tokens"]] * len(request["prompts"]):
            raise RuntimeError(f"asked {request['tokens']} tokens, got {[len(r) for r in tokens]}")
        return {"seconds": seconds, "tokens": tokens}
    if op == "score":
        totals = engine.score(request["windows"])
        return {"seconds": time.perf_counter() - start, "totals": totals}
    if op == "memory":
        return memory()
    return {"result": getattr(engine, op)(**request)}


def memory() -> dict[str, int]:
    """Bytes of this process: peak, and now in all, of its own, and of mapped files."""
    names = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "files"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def _die_with_parent() -> None:
    """A stopped process cannot notice that its input has ended, so the kernel ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    _die_with_parent()
    # Libraries print to standard output; the answers keep a copy of it and the rest goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = ENGINES[sys.argv[1]]()
    for line in sys.stdin:
        try:
            reply = answer(engine, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
