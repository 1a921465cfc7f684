"""Run in an interpreter that has vLLM (see test_vllm.py): greedy tokens of checkpoints, two requests at once.

Usage: python -I vllm_tokens.py REQUESTS TOKENS FOLDER…, REQUESTS being JSON: lists of token ids, each answered with so many tokens. Prints one
line of JSON: by folder the tokens of each request, or the error.
"""

import gc
import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, one after another
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def tokens(folder: str, requests: list[list[int]], count: int) -> list[list[int]]:
    """What the engine adds to each request."""
    engine = LLM(
        folder, trust_remote_code=True, model_impl="transformers", dtype="float32", max_model_len=64, enforce_eager=True
    )
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in requests], greedy, use_tqdm=False)
    found = [list(answer.outputs[0].token_ids) for answer in answers]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def tried(folder: str, requests: list[list[int]], count: int) -> list[list[int]] | str:
    """The tokens, or the error's name and text."""
    try:
        return tokens(folder, requests, count)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    requests, count = json.loads(sys.argv[1]), int(sys.argv[2])
    print(json.dumps({folder: tried(folder, requests, count) for folder in sys.argv[3:]}))
