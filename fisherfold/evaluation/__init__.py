"""Losses, answers, questions and tasks of a dense and a compressed model, side by side, and what they amount to (`verdict`); lm-eval
behind `harness`. Imports `run`, `network` and, to load checkpoints of ours by our own classes, `runtime`.
"""
