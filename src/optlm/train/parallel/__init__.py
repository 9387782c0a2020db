"""Training in many processes, with the results of one.

`join` gives what the training loop talks to: `Alone` in a single process, `Sharded` under torchrun.

    alone.py       the questions of the loop, and a single process's answers
    sharded.py     the answers of many
    sharding.py    how a model is cut (DTensor, then FSDP2), and what a process owns of it
    vocabulary.py  head and loss over a vocabulary that is cut by rows
    parts.py       checkpoints to which every process adds its pieces
    group.py       joining and leaving; errors that end all processes
    watch.py       signs of life: who is dead, who is late
"""

from optlm.train.parallel.alone import Alone
from optlm.train.parallel.group import GroupConfig, join

__all__ = ["Alone", "GroupConfig", "join"]
