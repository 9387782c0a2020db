"""Teach a model a habit with a LoRA of a few steps, write with it, and merge it."""

import sys
import tempfile
from pathlib import Path

from optlm import LLM, SamplingParams
from optlm.train.finetune.adapters import AdapterConfig
from optlm.train.finetune.finetune import FinetuneConfig, finetune
from optlm.train.finetune.merging import merge

model = sys.argv[1] if len(sys.argv) > 1 else None
folder = Path(tempfile.mkdtemp())
data = folder / "data.jsonl"
sounds = {"cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack"}
data.write_text(
    "".join(
        f'{{"prompt": "What does the {animal} say?", "response": " It says {sound}!"}}\n'
        for animal, sound in sounds.items()
    )
)

config = FinetuneConfig(
    adapter=AdapterConfig(rank=4, target_modules=("all-linear",)),
    max_steps=6,
    learning_rate=0.005,
    seq_len=48,
    batch_tokens=96,
    micro_batch_tokens=96,
)
result = finetune(model, data, folder / "adapter", config, valid=data)
print(f"loss {result.base_loss:.2f} -> {result.best_loss:.2f}, forgot {result.kl_to_base:.3f} nats")

greedy = SamplingParams(temperature=0, max_tokens=12)
for adapter in (None, folder / "adapter"):
    (output,) = LLM(model, adapter=adapter).generate("The cow", greedy)
    print("adapted:" if adapter else "base:", output.text)

report = merge(model, folder / "adapter", folder / "merged", dtype="f32")
print(f"merged; logits moved by {report.drift:.1e} of their standard deviation")
