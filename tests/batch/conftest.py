"""Jobs over the tiny models, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from batch_tools import RunJob

from optlm import LLM
from optlm.batch.engines import describe_engine
from optlm.batch.inputs import find_input
from optlm.batch.job import BatchJob, BatchReport, Engine
from optlm.batch.settings import BatchSettings
from variants import VARIANTS, make_state, write_checkpoint


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: write_checkpoint(folder / name, config, make_state(config))
        for name, config in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def llms(models: dict[str, Path]) -> dict[str, LLM]:
    return {name: LLM(folder) for name, folder in models.items()}


@pytest.fixture
def llm(llms: dict[str, LLM]) -> LLM:
    return llms["base"]


@pytest.fixture
def run_job(models: dict[str, Path], llms: dict[str, LLM]) -> RunJob:
    """Run a job from a path to a path; keywords are those of `BatchSettings`, then `BatchJob`."""

    def run(
        source: Path, out: Path | None, *, variant: str = "base", job: Any = None, **settings: Any
    ) -> BatchReport:
        settings.setdefault("sampling", {"max_tokens": 5})
        engine = Engine(
            load=lambda: llms[variant], described=describe_engine(models[variant], None, {})
        )
        return BatchJob(
            source=find_input(source),
            out=out,
            settings=BatchSettings(**settings),
            engine=engine,
            **(job or {}),
        ).run()

    return run
