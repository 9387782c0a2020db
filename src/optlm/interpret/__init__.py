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
from optlm.interpret.cache import Cache, run_with_cache, run_with_hooks
from optlm.interpret.lens import LogitLens, TokenProbabilities, logit_lens, token_probabilities
from optlm.interpret.points import POINTS, hook_names
from optlm.interpret.sparsity import (
    NeuronActivity,
    SparsityProfile,
    neuron_activity,
    sparsity_profile,
)
from optlm.interpret.subject import Subject, open_subject

__all__ = [
    "POINTS",
    "AttentionMaps",
    "Cache",
    "LogitLens",
    "NeuronActivity",
    "SparsityProfile",
    "Subject",
    "TokenProbabilities",
    "attention_maps",
    "hook_names",
    "logit_lens",
    "neuron_activity",
    "open_subject",
    "run_with_cache",
    "run_with_hooks",
    "sparsity_profile",
    "token_probabilities",
    "visit_attention",
]
