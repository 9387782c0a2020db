"""Ctrl-C at any line of the engine's bookkeeping leaves it usable."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from engine_fakes import FakeRunner, hashed_logits, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams

V = 31
RULE = hashed_logits(V)
PROMPTS = [[2, 5, 6, 7, 8], [2] * 12, [2, 5, 6, 7, 9], [3]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(seed=1, n=2, max_tokens=5, frequency_penalty=0.5),
    SamplingParams(temperature=0, beam_width=3, max_tokens=4),
    SamplingParams(seed=2, max_tokens=6, logprobs=1, prompt_logprobs=1),
]


def make() -> LLM:
    # 11 blocks of 4: the beam search takes blocks from the others.
    return LLM.from_runner(FakeRunner(RULE, tiny_config(V), num_blocks=11, max_batch_tokens=6))


WANTED = [[o.token_ids for o in output.outputs] for output in make().generate(PROMPTS, PARAMS)]


class Interrupt:
    """Raises KeyboardInterrupt at the `count`-th line executed in the engine."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, frame: FrameType, event: str, _: Any) -> Interrupt | None:
        if "optlm/engine" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 6000))
def test_an_interrupt_at_any_line_leaves_the_engine_usable(count: int) -> None:
    llm = make()
    before = sys.gettrace()
    sys.settrace(Interrupt(count))
    try:
        llm.generate(PROMPTS, PARAMS)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    llm.check_integrity()
    assert not llm.has_work
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [[o.token_ids for o in output.outputs] for output in outputs] == WANTED
