"""Engines of every variant, once a session."""

from __future__ import annotations

import pytest
from score_bench import Bench

from optlm import LLM
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(scope="session")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    root = tmp_path_factory.mktemp("score")
    made = {}
    for name, config in VARIANTS.items():
        folder = write_checkpoint(root / name, config, make_state(config))
        made[name] = Bench(name, folder, LLM(folder, dtype="f32", threads=1))
    return made


@pytest.fixture(params=list(VARIANTS))
def bench(request: pytest.FixtureRequest, benches: dict[str, Bench]) -> Bench:
    return benches[request.param]


@pytest.fixture
def base(benches: dict[str, Bench]) -> Bench:
    return benches["base"]
