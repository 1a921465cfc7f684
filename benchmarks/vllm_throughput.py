"""Run by serving.py in an interpreter that has vLLM: what `vllm bench throughput` gives of several models, all in one process.

Usage: python -I vllm_throughput.py DTYPE REPEATS REQUESTS PROMPT TOKENS IMPLEMENTATION:FOLDER…, IMPLEMENTATION being auto or transformers. Requests are
the command's own random texts. Prints one line of JSON: of each model the most requests a second of its turns.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, one after another
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm.benchmarks.throughput import add_cli_args, main
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.utils.argparse_utils import FlexibleArgumentParser

SWITCHES = ["--trust-remote-code", "--enforce-eager", "--no-enable-prefix-caching", "--disable-detokenize"]


def requests_a_second(model: str, dtype: str, requests: int, prompt: int, tokens: int) -> float:
    """As the command measures it, after one request that does not count."""
    implementation, _, folder = model.partition(":")
    answer = Path(tempfile.mkdtemp()) / "bench.json"
    settings: dict[str, object] = {
        "--model": folder, "--model-impl": implementation, "--dtype": dtype, "--max-model-len": 2 * (prompt + tokens), "--dataset-name": "random",
        "--random-input-len": prompt, "--random-output-len": tokens, "--num-prompts": requests, "--num-warmups": 1, "--output-json": answer,
    }  # fmt: skip
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args([*SWITCHES, *(str(word) for pair in settings.items() for word in pair)]))
    gc.collect()
    cleanup_dist_env_and_memory()
    return float(json.loads(answer.read_text(encoding="utf-8"))["requests_per_second"])


if __name__ == "__main__":
    dtype, *sizes = sys.argv[1:6]
    repeats, *request = map(int, sizes)
    models = sys.argv[6:]
    turns = [[requests_a_second(model, dtype, *request) for model in models] for _ in range(repeats)]
    print(json.dumps([max(found) for found in zip(*turns, strict=True)]))
