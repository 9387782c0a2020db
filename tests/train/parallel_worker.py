"""What one of several processes does in test_parallel.py; loaded once, then forked for each."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import warnings
from pathlib import Path

warnings.simplefilter("error")  # as pytest does

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from optlm.errors import OptlmError  # noqa: E402
from optlm.model import OPT, OPTOutput  # noqa: E402
from optlm.train.loop.loss import head_cross_entropy  # noqa: E402
from optlm.train.loop.optim import clip  # noqa: E402
from optlm.train.parallel import Alone, GroupConfig, join  # noqa: E402
from optlm.train.parallel.sharded import Sharded  # noqa: E402
from optlm.train.pretrain import pretrain as module  # noqa: E402
from optlm.train.pretrain.recipe import PretrainConfig  # noqa: E402
from variants import VARIANTS  # noqa: E402


def train(settings: str, out: str, tensor: str = "1", fault: str = "") -> None:
    """Pretrain; `fault` is "kill 1 5": on rank 1, when the batch of step 5 is asked for."""
    config = PretrainConfig.from_file(Path(settings))
    with join(GroupConfig(tensor=int(tensor), patience=3.0, timeout=60.0)) as parallel:
        if fault:
            _plan_fault(parallel, *fault.split())
        module.pretrain(config, Path(out), parallel=parallel)


def _plan_fault(parallel: Alone, kind: str, rank: str, step: str) -> None:
    def batch(mixture: object, at: int) -> object:
        if parallel.rank == int(rank) and at == int(step):
            if kind == "raise":
                raise OptlmError(f"a planned error at step {at}")
            os.kill(os.getpid(), getattr(signal, f"SIG{kind.upper()}"))
        return whole(mixture, at)

    whole = module.Mixture.batch
    module.Mixture.batch = batch


def variants() -> None:
    """Every variant, cut in every way that four processes allow, against the whole model."""
    with join() as parallel:
        for name, config in VARIANTS.items():
            config = dataclasses.replace(config, num_attention_heads=4, dropout=0.0)
            for tensor in (2, 4):
                grid = Sharded(tensor, torch.device("cpu"), parallel._watch)
                _compare(f"{name}, tensor {tensor}", grid, config)


def _compare(label: str, parallel: Sharded, config: object) -> None:
    torch.manual_seed(0)
    whole, cut = OPT(config).eval(), OPT(config).eval()
    cut.load_state_dict(whole.state_dict())
    own, _ = parallel.place(cut, cut, "adamw")
    tokens = torch.randint(4, config.vocab_size, (2, 17))

    def logits(model: OPT) -> dict[str, Tensor]:
        with torch.no_grad():
            first: OPTOutput = model(tokens[:, :9], output_hidden_states=True)
            rest = model(tokens[:, 9:], past=first.cache)  # the cache holds this process's heads
        found = torch.cat([first.logits, rest.logits], dim=1)
        return {"logits": found, "last": first.hidden_states[-1]}

    found = parallel.judge(logits, cut)
    for name, value in logits(whole).items():
        bound = 1e-6 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=label)

    def loss(model: OPT) -> Tensor:
        hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
        return head_cross_entropy(hidden, model.head_weight, tokens[:, 1:].flatten())

    wanted, got = loss(whole), parallel.call(loss, cut)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    wanted.backward()
    got.backward()
    # Groups that read the same rows add up: their sum counts `groups` times.
    norms = clip(whole, 1.0), parallel.clip(own, 1.0, divide_by=parallel.groups)
    assert abs(norms[0][0] / norms[1][0] - 1) < 1e-5, (label, norms)
    assert norms[0][1].keys() == norms[1][1].keys()
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    for name, p in own.named_parameters():
        expected = gradients[name][parallel._pieces[name].slices]
        torch.testing.assert_close(
            p.grad,
            expected,
            rtol=1e-4,
            atol=1e-6,
            msg=functools.partial("{} {}: {}".format, label, name),
        )


def run(environment: dict[str, str], errors: str, job: tuple[str, ...]) -> None:
    """The main function of a process; stderr goes to the file `errors`."""
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    try:
        JOBS[job[0]](*job[1:])
    except OptlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)


JOBS = {"train": train, "variants": variants}
