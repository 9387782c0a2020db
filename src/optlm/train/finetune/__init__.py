"""Fine-tuning: examples, packing, full weights or adapters, merging, the linter."""
