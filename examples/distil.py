"""A small student of a model, trained for a few steps on a page of text, and how near it came."""

import json
import sys
import tempfile
from pathlib import Path

from optlm.train.distil.distil import DistilConfig, distil
from optlm.train.distil.report import write_report

teacher = sys.argv[1] if len(sys.argv) > 1 else "bundled"
folder = Path(tempfile.mkdtemp())
story = "Once upon a time there was a little cat. The cat sat on the mat and looked at the rain. "
lines = [json.dumps({"text": story * (2 + i % 3)}) for i in range(20)]
(folder / "text.jsonl").write_text("\n".join(lines))

config = DistilConfig.from_dict(
    {
        "teacher": teacher,
        "model": {"num_hidden_layers": 1},  # all else is the teacher's
        "losses": {"forward_kl": 1.0, "labels": 0.5},
        "data": {
            "parts": [{"name": "stories", "file": str(folder / "text.jsonl"), "weight": 1}],
            "validation": {"stories": str(folder / "text.jsonl")},
        },
        "loop": {"steps": 4, "optim": {"learning_rate": 0.001, "warmup_steps": 2}},
        "batch_tokens": 128,
        "micro_batch_tokens": 128,
        "sequence_lengths": {"32": 1},
        "validation_bytes": 1000,
    }
)
student = distil(config, folder / "run")
twin = distil(config.control, folder / "twin")
print(write_report(config, folder, {"student": student, "without teacher": twin}, speed=False))
