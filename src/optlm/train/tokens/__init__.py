"""Training text as token ids: the tokenizer, packed files, the order, counts of words."""
