"""Pre-training from text files, its recipes and yardsticks, and the BabyLM protocol."""
