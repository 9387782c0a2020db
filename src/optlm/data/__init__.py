"""Text for training: reading, cleaning, deduplication, and a look at what a model will see.

    lines, inputs, records    files -> records, with what is broken counted
    words                     text -> word hashes, on which everything below stands
    rules, clean              filters in the manner of Gopher and C4, and the pipeline around them
    minhash, buckets, dedup   exact and near duplicates, in bounded memory
    overlap                   which text also stands in evaluation files
    verify, card              packed data: checked against its manifest, described for readers

No part of it needs PyTorch.
"""
