#!/usr/bin/env sh
# What is to be checked on a CUDA device: the tests marked gpu, then capture and inference in the shapes of LLaMA-7B; figures in gpu.json.
set -eu
cd "$(dirname "$0")/.."
python -m pytest -m gpu -rs
PYTHONPATH="$PWD" python benchmarks/gpu.py "$@"
