"""Run by serving.py in an interpreter that has vLLM: seconds in which several models answer the same requests.

Usage: python -I vllm_requests.py DTYPE REPEATS REQUESTS PROMPT TOKENS IMPLEMENTATION:FOLDER…, IMPLEMENTATION being auto or transformers. Requests
are random tokens, all sent at once; answers have TOKENS tokens. Prints one line of JSON: by folder the medians of the seconds on the clock and of the processor's.
"""

import gc
import json
import os
import random
import statistics
import sys
import time

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, one after another
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

WORDS = 1000  # ids below this are in every vocabulary


def seconds(folder: str, dtype: str, repeats: int, prompts: list[list[int]], tokens: int) -> list[float]:
    """The median times of a model for all requests, after a warm-up."""
    implementation, _, path = folder.partition(":")
    engine = LLM(
        path,
        model_impl=implementation,
        trust_remote_code=True,
        dtype=dtype,
        max_model_len=len(prompts[0]) + tokens,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # the same requests come again
    )
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    engine.generate(requests[:1], SamplingParams(temperature=0, max_tokens=4, detokenize=False), use_tqdm=False)
    found = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        engine.generate(requests, greedy, use_tqdm=False)
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return [statistics.median(times) for times in zip(*found, strict=True)]


if __name__ == "__main__":
    dtype, *sizes = sys.argv[1:6]
    repeats, count, length, tokens = map(int, sizes)
    generator = random.Random(0)
    prompts = [[generator.randrange(3, WORDS) for _ in range(length)] for _ in range(count)]
    print(json.dumps([seconds(folder, dtype, repeats, prompts, tokens) for folder in sys.argv[6:]]))
