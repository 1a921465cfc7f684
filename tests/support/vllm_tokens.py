"""Run in an interpreter that has vLLM (see test_vllm.py): greedy tokens of checkpoints, two requests at once.

Usage: python -I vllm_tokens.py REQUESTS TOKENS PARTS COMPILED FOLDER…, REQUESTS being JSON: lists of token ids, each answered with so many tokens; PARTS is
the number of processes that compute a layer together, COMPILED true or false. The environment is `vllm_server.SETTINGS`. Prints one line of JSON: by folder the tokens of each
request and the sum of their log-probabilities, or the error.

Of vLLM's kernels for CPUs those that know AVX2 alone have no product of matrices of 4 bits; there one in torch takes its place, from the layout that vLLM has
brought the checkpoint's tensors into.
"""

import gc
import json
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def tokens(
    folder: str, requests: list[list[int]], count: int, parts: int, compiled: bool
) -> list[tuple[list[int], float]]:
    """What the engine adds to each request, each layer split over so many processes."""
    options = {"dtype": "float32", "max_model_len": 64, "enforce_eager": not compiled, "tensor_parallel_size": parts}
    engine = LLM(folder, trust_remote_code=True, **options)
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in requests], greedy, use_tqdm=False)
    found = [(list(answer.outputs[0].token_ids), answer.outputs[0].cumulative_logprob) for answer in answers]
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


BLOCK, WORD = 16, 8  # outputs that lie together, of so many a word of 32 bits
PRODUCT = "cpu_gemm_wna16(Tensor x, Tensor words, Tensor(a!) y, Tensor scales, Tensor? zeros, Tensor? bias, int word, str kind) -> ()"


def product_of_four_bits(
    x: torch.Tensor, words: torch.Tensor, y: torch.Tensor, scales: torch.Tensor, zeros: None, bias: Any, *_: Any
) -> None:
    """y = x W + b into y [T, n]; words [n / 16, m · 2] have the codes, scales [groups, n]."""
    m, n = x.shape[1], scales.shape[1]
    codes = (words.view(n // BLOCK, m, BLOCK // WORD, 1) >> torch.arange(0, 32, 4)) & 15
    codes = codes.reshape(n // BLOCK, m, BLOCK).transpose(0, 1).reshape(m, n) - 8
    W = codes * scales.repeat_interleave(m // len(scales), 0)
    y.copy_(x @ W.to(x.dtype) + (0 if bias is None else bias))


def fill_in() -> None:
    """Give vLLM the product if it has none."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        own = torch.library.Library("_C", "FRAGMENT")
        own.define(PRODUCT)
        own.impl("cpu_gemm_wna16", product_of_four_bits, "CPU")
        KEPT.append(own)


KEPT: list[Any] = []
"""What has to live as long as the process."""


def tried(folder: str, *request: Any) -> list[tuple[list[int], float]] | str:
    """What `tokens` gives, or the error's name and text."""
    try:
        return tokens(folder, *request)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    fill_in()
    asked = list(map(json.loads, sys.argv[1:5]))
    print(json.dumps({folder: tried(folder, *asked) for folder in sys.argv[5:]}))
