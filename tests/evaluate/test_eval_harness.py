"""The harness on our engine gives what the harness gives on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optlm import LLM, bundled_model
from optlm.errors import RequestError
from optlm.evaluate.harness import EngineLM, sampling_params
from optlm.evaluate.protocol import ProtocolTask
from optlm.evaluate.tasks import TASKS
from variants import VARIANTS, tiny_tokenizer

COMPARED = ("hellaswag", "arc_easy", "winograd", "crows_pairs", "nq_open", "udhr")
NATS = 1e-3


def peer_of(folder: Path, vocab_size: int | None) -> Any:
    """The harness's own model class over transformers."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    model = transformers.OPTForCausalLM.from_pretrained(folder, torch_dtype="float32")
    if vocab_size is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer(vocab_size),
            bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        )  # fmt: skip
    # Its cache mistakes the border of two requests with equal tokens (0.4.13): without it.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, logits_cache=False)


def answers(lm: Any, name: str, sets: Path, shots: int, limit: int) -> tuple[list[Any], Any]:
    """What a model answers to each request of a task, and the results."""
    from lm_eval.evaluator import evaluate as run_harness

    ours = lm.scorer.tokenizer if isinstance(lm, EngineLM) else None
    encode = (lambda t: lm.tok_encode(t)) if ours is None else (lambda t: ours.encode(t))
    task = ProtocolTask(
        TASKS[name], sets, num_fewshot=shots if TASKS[name].takes_shots else 0,
        encode=lambda t: encode(t)[1:], context=lm.max_length,
    )  # fmt: skip
    task.set_fewshot_seed(7)
    found = run_harness(
        lm=lm, task_dict={"tasks": {name: task}, "groups": {}}, limit=limit, bootstrap_iters=0
    )
    return [request.resps[0] for request in task.instances], found["results"][name]


def compare(llm: LLM, peer: Any, sets: Path, *, limit: int) -> None:
    lm = EngineLM(llm=llm)
    for name in COMPARED:
        for shots in (0, 2) if TASKS[name].takes_shots else (0,):
            mine, my_results = answers(lm, name, sets, shots, limit)
            theirs, their_results = answers(peer, name, sets, shots, limit)
            assert len(mine) == len(theirs) > 0
            for got, wanted in zip(mine, theirs, strict=True):
                if isinstance(wanted, tuple):
                    assert got[0] == pytest.approx(wanted[0], abs=NATS), name
                    assert got[1] == wanted[1], name
                elif isinstance(wanted, float):
                    assert got == pytest.approx(wanted, abs=NATS), name
                else:
                    assert got == wanted, name
            values = {k: v for k, v in my_results.items() if isinstance(v, float)}
            for key, value in values.items():
                assert value == pytest.approx(their_results[key], abs=1e-3), (name, key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_on_transformers(variant: str, folders: dict[str, Path], sets: Path) -> None:
    peer = peer_of(folders[variant], VARIANTS[variant].vocab_size)
    compare(LLM(str(folders[variant]), dtype="f32"), peer, sets, limit=3)


@pytest.mark.filterwarnings("ignore")
def test_as_on_transformers_with_the_bundled_model(sets: Path) -> None:
    compare(LLM(dtype="f32"), peer_of(bundled_model(), None), sets, limit=4)


@pytest.mark.filterwarnings("ignore")
def test_the_harness_knows_the_model_by_name(folders: dict[str, Path]) -> None:
    from lm_eval.api.registry import get_model

    lm = get_model("optlm").create_from_arg_string(
        f"model={folders['base']},dtype=f32", {"batch_size": 8, "device": None}
    )
    assert isinstance(lm, EngineLM)
    assert lm.max_length == 512
    assert lm.eot_token_id == 2


def test_endings_of_one_context_are_read_within_the_trie(base: LLM) -> None:
    """Four endings: forward tokens within 5 % of what the tokens' trie needs."""
    from lm_eval.api.instance import Instance

    context = "the cat sat on the mat and then the other cats went to their home " * 3
    endings = [" in the rain", " in the little time", " upon a time", " on the mat again"]
    lm = EngineLM(llm=base)
    encode = lm.scorer.tokenizer.encode
    lm.loglikelihood(
        [Instance("loglikelihood", {}, (context, ending), i) for i, ending in enumerate(endings)]
    )
    paths = {
        tuple(ids[:length])
        for ids in (encode(context + ending) for ending in endings)
        for length in range(1, len(ids))  # the last token of a sequence is not read
    }
    assert len(paths) <= lm.scorer.num_forward_tokens <= 1.05 * len(paths)


def test_generation_options_of_the_harness() -> None:
    greedy = sampling_params(
        {"until": ["\n"], "max_gen_toks": 5, "temperature": 0.7, "do_sample": False}
    )
    assert greedy.is_greedy
    assert (greedy.max_tokens, tuple(greedy.stop)) == (5, ("\n",))
    drawn = sampling_params({"until": "x", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.7, 0.9, 256)
    assert sampling_params({"temperature": 0.5}).temperature == 0.5
    with pytest.raises(RequestError, match=r"'top_q'; did you mean 'top_"):
        sampling_params({"top_q": 1})
