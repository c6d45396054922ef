"""Evaluation: benchmarks against mlx-lm, the parts of a block, tasks, reports and training curves."""
