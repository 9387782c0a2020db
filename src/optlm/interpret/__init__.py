"""Looking inside: hooks and caches, attention, lenses, attributions, patching, sparsity.

    subject = open_subject("facebook/opt-125m")
    tokens = subject.tokens("The cat sat on the mat.")
    lens = logit_lens(subject.model, tokens)

Everything takes the reference model (`optlm.model.OPT`) and token ids, works on every variant of
OPT or says why not, and gives frozen dataclasses of numpy arrays. Needs PyTorch
(pip install 'optlm[interpret]'). docs/interpretability.md tells how to use it.
"""

from __future__ import annotations

from optlm.interpret.attention import AttentionMaps, attention_maps, visit_attention
from optlm.interpret.attribution import TokenAttribution, attribute_tokens
from optlm.interpret.cache import Cache, run_with_cache, run_with_hooks
from optlm.interpret.decompose import (
    DirectAttribution,
    LogitParts,
    decompose_logit,
    direct_attribution,
)
from optlm.interpret.lens import LogitLens, TokenProbabilities, logit_lens, token_probabilities
from optlm.interpret.patching import (
    Site,
    ablate,
    logit_difference,
    patch,
    sweep_ablation,
    sweep_patching,
)
from optlm.interpret.points import POINTS, hook_names
from optlm.interpret.roles import HeadAlignment, HeadReport, align_heads, head_report
from optlm.interpret.sparsity import (
    NeuronActivity,
    SparsityProfile,
    neuron_activity,
    sparsity_profile,
)
from optlm.interpret.statistics import HeadStatistics, head_statistics, repeated_tokens
from optlm.interpret.subject import Subject, open_subject
from optlm.interpret.tracing import CausalTrace, trace_fact

__all__ = [
    "POINTS",
    "AttentionMaps",
    "Cache",
    "CausalTrace",
    "DirectAttribution",
    "HeadAlignment",
    "HeadReport",
    "HeadStatistics",
    "LogitLens",
    "LogitParts",
    "NeuronActivity",
    "Site",
    "SparsityProfile",
    "Subject",
    "TokenAttribution",
    "TokenProbabilities",
    "ablate",
    "align_heads",
    "attention_maps",
    "attribute_tokens",
    "decompose_logit",
    "direct_attribution",
    "head_report",
    "head_statistics",
    "hook_names",
    "logit_difference",
    "logit_lens",
    "neuron_activity",
    "open_subject",
    "patch",
    "repeated_tokens",
    "run_with_cache",
    "run_with_hooks",
    "sparsity_profile",
    "sweep_ablation",
    "sweep_patching",
    "token_probabilities",
    "trace_fact",
    "visit_attention",
]
