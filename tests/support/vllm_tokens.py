"""Run in an interpreter that has vLLM (see test_vllm.py): greedy tokens of checkpoints, two requests at once.

Usage: python -I vllm_tokens.py REQUESTS TOKENS PARTS FOLDER…, REQUESTS being JSON: lists of token ids, each answered with so many tokens; PARTS is
the number of processes that compute a layer together. The environment is `vllm_server.SETTINGS`. Prints one line of JSON: by folder the tokens of each
request and the sum of their log-probabilities, or the error.
"""

import gc
import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def tokens(folder: str, requests: list[list[int]], count: int, parts: int) -> list[tuple[list[int], float]]:
    """What the engine adds to each request, each layer split over so many processes."""
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "tensor_parallel_size": parts}
    engine = LLM(folder, trust_remote_code=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in requests], greedy, use_tqdm=False)
    found = [(list(answer.outputs[0].token_ids), answer.outputs[0].cumulative_logprob) for answer in answers]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def tried(folder: str, *request: Any) -> list[tuple[list[int], float]] | str:
    """What `tokens` gives, or the error's name and text."""
    try:
        return tokens(folder, *request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    requests, count, parts = map(json.loads, sys.argv[1:4])
    print(json.dumps({folder: tried(folder, requests, count, parts) for folder in sys.argv[4:]}))
