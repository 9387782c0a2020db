"""One engine and several threads: their calls take turns."""

from __future__ import annotations

import sys
import threading

from naive import GREEDY, hashed


def test_threads_that_share_an_engine_wait_for_each_other() -> None:
    llm = hashed()
    prompts = [[5, 6], [7], [8, 9, 10]]
    wanted = [llm.generate(prompt, GREEDY)[0].token_ids for prompt in prompts]
    scores = llm.score(prompts[2])[0].total
    found: list[object] = []

    def work(prompt: list[int]) -> None:
        for _ in range(10):
            streamed = [i for piece in llm.stream(prompt, GREEDY) for i in piece.token_ids]
            found.append((prompt, streamed == llm.generate(prompt, GREEDY)[0].token_ids))
            found.append((prompt, streamed == wanted[prompts.index(prompt)]))
            found.append((prompt, llm.score(prompts[2])[0].total == scores))

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert len(found) == 90
    assert all(right for _, right in found)  # type: ignore[misc]
    llm.check_integrity()
