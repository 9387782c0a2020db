"""Look inside: what each layer would say, which heads copy, and what the next token rests on."""

import sys
import tempfile
from pathlib import Path

from optlm.interpret import (
    Site,
    ablate,
    attribute_tokens,
    decompose_logit,
    head_report,
    logit_lens,
    open_subject,
)
from optlm.interpret.page import inspect_page

subject = open_subject(sys.argv[1] if len(sys.argv) > 1 else None)
model = subject.model
text = "Tom had a ball. Tom"
tokens = subject.tokens(text)

lens = logit_lens(model, tokens, top=3)
for row, best in enumerate(lens.top_ids[:, -1]):
    print(f"{f'layer {row - 1}' if row else 'embedding':10} {subject.texts(best)}")

report = head_report(model, [tokens])
for head in [*report.with_role("induction"), *report.with_role("previous")]:
    site = Site(point=f"layers.{head.layer}.self_attn.hook_heads", head=head.head)
    moved = abs(ablate(model, tokens, [site]) - ablate(model, tokens, [])).max()
    print(f"head {head.layer}.{head.head}: {head.role} {head.score:.2f}; without it {moved:.2f}")

parts = decompose_logit(model, tokens)
print(f"logit of {subject.texts([parts.token])[0]!r}: {parts.logit:.3f}")
for part in parts.largest(5):
    print(f"  {part.value:+.3f} {part.name}")

found = attribute_tokens(model, tokens, method="occlusion", baseline="zero")
for piece, value in zip(subject.texts(tokens), found.values, strict=True):
    print(f"{value:+8.3f} {piece!r}")

page = Path(tempfile.mkdtemp()) / "page.html"
page.write_text(inspect_page(subject, text).html, encoding="utf-8")
print(f"the same and the attention maps are in {page}")
