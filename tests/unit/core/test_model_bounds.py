"""What `optlm._core.Model` refuses: with an exception, never a crash, a hang or a stray read."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.typing import NDArray

_core = pytest.importorskip("optlm._core", reason="the compiled core is not built")

SIZES = {
    "vocab_size": 300, "hidden_size": 48, "num_layers": 2, "ffn_dim": 112, "num_heads": 3,
    "max_positions": 64, "embed_dim": 48, "num_blocks": 8, "max_batch_tokens": 32, "threads": 1,
}  # fmt: skip


def model(**sizes: int) -> _core.Model:
    return _core.Model(
        **{**SIZES, **sizes}, norm_before=True, final_norm=True, tied=True, activation="relu",
        dtype="f32", kv_dtype="f32", positions_dtype="f32",
    )  # fmt: skip


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def run(core: _core.Model, seq_starts: NDArray[np.int32]) -> NDArray[np.float32]:
    tokens, tables = ints(2, 3, 4), np.zeros((len(seq_starts) - 1, 4), np.int32)
    logits = np.empty((1, SIZES["vocab_size"]), np.float32)
    core.forward(tokens, ints(0, 1, 2), seq_starts, tables, ints(2), logits, None)
    return logits


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, -(2**62), 2**60, 2**63 - 1])
def test_absurd_sizes_are_refused(name: str, value: int) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        model(**{name: value})


def test_a_cache_beyond_all_memory_is_refused() -> None:
    with pytest.raises(MemoryError):
        model(num_blocks=2**31 - 1, num_layers=4, hidden_size=2**20, num_heads=2**20)


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        model(num_heads=5)


@pytest.mark.parametrize("starts", [(0, 50, 3), (0, 1, 2**30, 2**31 - 1, 3), (0, -5, 3)])
def test_sequences_beyond_the_tokens_are_refused(starts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"seq_starts|every sequence"):
        run(model(), ints(*starts))


def test_quantised_tensors_are_refused() -> None:
    core, data = model(), np.zeros(112 * 48, np.uint8)
    with pytest.raises(ValueError, match="int8"):
        core.load("model.decoder.layers.0.fc1.weight", data, "int8", 112, 48)


def test_calls_from_several_threads_take_turns() -> None:
    core = model(threads=2)
    expected = run(core, ints(0, 3))
    equal = []

    def work() -> None:
        equal.extend(np.array_equal(run(core, ints(0, 3)), expected) for _ in range(200))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert equal == [True] * 600


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_process_is_told() -> None:
    core = model(threads=2)
    run(core, ints(0, 3))
    child = os.fork()
    if child == 0:
        try:
            run(core, ints(0, 3))
        except RuntimeError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_a_system_out_of_threads_is_an_exception() -> None:
    program = (
        "import resource; import test_model_bounds as t; "
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        "try: t.model(threads=1000)\n"
        "except RuntimeError as error: print(error)"
    )
    here = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "of 1000 threads" in done.stdout
