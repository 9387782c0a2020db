"""Distillation: teacher, cache, student, losses and the report."""
