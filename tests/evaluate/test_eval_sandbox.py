"""Programs of a model run confined."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import NoReturn

import pytest

from optlm import LLM
from optlm.errors import BackendError
from optlm.evaluate import sandbox
from optlm.evaluate.measures import binary_f1, exact_match, macro_f1, wilson
from optlm.evaluate.run import evaluate
from optlm.evaluate.sandbox import first_block, passes

CHECK = "def check(f):\n    assert f(1) == 1\n"
GOOD = "def f(x):\n    return x\n"


@pytest.fixture(scope="module", autouse=True)
def _needs_namespaces() -> None:
    try:
        passes(GOOD, CHECK, "f")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("program", "verdict"),
    [
        (GOOD, True),
        ("def f(x):\n    return 2\n", False),
        ("def f(x):\n    return x\nimport sys\nsys.exit(0)\n", False),
        ("def f(x): return", False),
        ("syntax error", False),
        ("def f(x):\n    bytearray(1 << 31)\n    return x\n", False),
        ("def f(x):\n    open('a', 'w').write('x' * (1 << 21))\n    return x\n", False),
        ("import os\ndef f(x):\n    assert not os.environ.get('PATH')\n    return x\n", True),
    ],
)
def test_verdicts(program: str, verdict: bool) -> None:
    assert passes(program, CHECK, "f") is verdict


def test_a_program_that_does_not_end_is_ended() -> None:
    start = time.monotonic()
    assert not passes("def f(x):\n    while True: pass\n", CHECK, "f", seconds=0.5)
    assert time.monotonic() - start < 10


def test_nothing_is_reachable_not_even_this_machine() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n"
        alone = subprocess.run(["python3", "-c", reach], check=False, capture_output=True)
        assert alone.returncode == 0  # it would be reached
        assert not passes(reach + GOOD, CHECK, "f")


def test_without_a_namespace_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise OSError(1, "unshare")

    monkeypatch.setattr(sandbox, "_confine", refuse)
    with pytest.raises(BackendError, match="are not run"):
        passes(GOOD, CHECK, "f")


def test_completions_end_where_the_function_does() -> None:
    assert first_block("    a\n\n    b\nprint(1)\n    c") == "    a\n\n    b"


def test_the_task(base: LLM, sets: Path) -> None:
    (found,) = evaluate(base, ["humaneval"], data=sets, run_code=True).results
    assert found.main.value in (0.0, 1.0)


def test_measures() -> None:
    assert exact_match("The Cat!", ["a cat"]) == 1.0
    assert exact_match("cats", ["cat"]) == 0.0
    pairs = [(1, 1), (1, 0), (0, 1), (0, 0)]
    assert binary_f1(pairs) == 0.5
    assert binary_f1([(1, 0)]) == 0.0
    sklearn = pytest.importorskip("sklearn.metrics")
    pairs = [(0, 1), (1, 1), (2, 1), (2, 2), (0, 0), (1, 2)]
    gold, said = zip(*pairs, strict=True)
    assert macro_f1(pairs) == pytest.approx(sklearn.f1_score(gold, said, average="macro"))
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Brown, Cai, DasGupta 2001
    assert wilson(0, 0) == (0.0, 1.0)
