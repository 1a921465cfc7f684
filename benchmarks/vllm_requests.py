"""Run by serving.py in an interpreter that has vLLM: seconds in which several models answer the same requests.

Usage: python -I vllm_requests.py SETTINGS IMPLEMENTATION:FOLDER…, SETTINGS being JSON (`serving.SETTINGS`; the environment `serving.ENVIRONMENT`), IMPLEMENTATION
auto or transformers. Requests are random tokens, all sent at once; each answer has the same number of tokens. Prints one line of JSON: by folder
the medians of the seconds on the clock and of the processor's.
"""

import gc
import json
import random
import statistics
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

WORDS = 1000  # ids below this are in every vocabulary


def seconds(model: str, settings: dict[str, Any], prompts: list[list[int]]) -> list[float]:
    """The median times of a model for all requests, after a warm-up."""
    implementation, _, folder = model.partition(":")
    tokens = settings["tokens"]
    engine = LLM(
        folder,
        model_impl=implementation,
        trust_remote_code=True,
        dtype=settings["dtype"],
        load_format="dummy" if settings["empty"] else "auto",
        max_model_len=settings["prompt"] + tokens,
        enforce_eager=not settings["compiled"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # the same requests come again
    )
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": ids} for ids in prompts]
    engine.generate(requests[:1], SamplingParams(temperature=0, max_tokens=4, detokenize=False), use_tqdm=False)
    found = []
    for _ in range(settings["repeats"]):
        start = time.perf_counter(), time.process_time()
        engine.generate(requests, greedy, use_tqdm=False)
        found.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return [statistics.median(times) for times in zip(*found, strict=True)]


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    generator = random.Random(0)
    prompts = [[generator.randrange(3, WORDS) for _ in range(settings["prompt"])] for _ in range(settings["requests"])]
    print(json.dumps([seconds(model, settings, prompts) for model in sys.argv[2:]]))
