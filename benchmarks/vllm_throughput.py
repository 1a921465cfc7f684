"""Run by serving.py in an interpreter that has vLLM: what `vllm bench throughput` gives of several models, all in one process.

Usage: python -I vllm_throughput.py SETTINGS IMPLEMENTATION:FOLDER…, as vllm_requests.py has it. Requests are the command's own random texts.
Prints one line of JSON: of each model the most requests a second of its turns.
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm.benchmarks.throughput import add_cli_args, main
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.utils.argparse_utils import FlexibleArgumentParser


def requests_a_second(model: str, settings: dict[str, Any]) -> float:
    """As the command measures it, after one request that does not count."""
    implementation, _, folder = model.partition(":")
    answer = Path(tempfile.mkdtemp()) / "bench.json"
    prompt, tokens = settings["prompt"], settings["tokens"]
    words: dict[str, object] = {
        "--model": folder, "--model-impl": implementation, "--dtype": settings["dtype"], "--load-format": "dummy" if settings["empty"] else "auto",
        "--max-model-len": 2 * (prompt + tokens), "--dataset-name": "random", "--random-input-len": prompt, "--random-output-len": tokens,
        "--num-prompts": settings["requests"], "--num-warmups": 1, "--output-json": answer,
    }  # fmt: skip
    switches = ["--trust-remote-code", "--no-enable-prefix-caching", "--disable-detokenize"]
    switches += [] if settings["compiled"] else ["--enforce-eager"]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args([*switches, *(str(word) for pair in words.items() for word in pair)]))
    gc.collect()
    cleanup_dist_env_and_memory()
    return float(json.loads(answer.read_text(encoding="utf-8"))["requests_per_second"])


if __name__ == "__main__":
    settings, models = json.loads(sys.argv[1]), sys.argv[2:]
    turns = [[requests_a_second(model, settings) for model in models] for _ in range(settings["repeats"])]
    print(json.dumps([max(found) for found in zip(*turns, strict=True)]))
