"""Text for training: reading, cleaning, deduplication, and what is packed of it.

    lines, inputs, records    files -> records, with what is broken counted
    words, minhash            text -> word hashes, on which everything below stands
    rules, repetition, c4_lines, clean, tally
                              filters in the manner of Gopher and C4, and the pipeline around them
    buckets, dedup            exact and near duplicates, in bounded memory
    overlap                   which text also stands in evaluation files
    packed, card              packed data: checked against its manifest, described for readers

No part of it needs PyTorch.
"""
