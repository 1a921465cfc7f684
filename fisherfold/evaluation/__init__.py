"""Losses, answers and tasks of a dense and a compressed model, side by side; lm-eval behind `harness`. Imports `run` and `network`."""
