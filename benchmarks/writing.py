"""Free text that the model writes itself against transformers' own sampling of as many texts in the same dtype.

    python benchmarks/writing.py --project .              # after stage prepare; a minute or two

Seconds for a batch of texts of so many tokens, all on the same threads, and the first by the second.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import at_most
from transformers import GenerationConfig

from fisherfold.inputs.sampling import BATCH, Writer, writer, writing_dtype
from fisherfold.run.determinism import computing_threads
from fisherfold.run.params import PrepareParams
from fisherfold.run.workspace import Workspace

TARGET = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=BATCH)
    parser.add_argument("--tokens", type=int, default=255)
    options = parser.parse_args()
    model = Workspace(options.project.resolve()).model
    own = writer(model, writing_dtype(PrepareParams()))
    begun = [[5 + number] for number in range(options.texts)]
    with computing_threads(options.threads):
        ours = seconds(lambda tokens: own.write(begun, tokens, [], seed=0), options.tokens)
        theirs = seconds(lambda tokens: sampled(own, begun, tokens), options.tokens)
    rate = options.texts * options.tokens / ours
    what = f"{options.texts} texts of {options.tokens} tokens ({ours:.0f} s, {rate:.0f} tokens a second)"
    what += f" / transformers' sampling ({theirs:.0f} s)"
    print(at_most(what, ours / theirs, "x", TARGET))


def seconds(write: Callable[[int], object], tokens: int) -> float:
    """How long `tokens` take, after a few that warm up."""
    write(4)
    start = time.perf_counter()
    write(tokens)
    return time.perf_counter() - start


def sampled(own: Writer, begun: list[list[int]], tokens: int) -> torch.Tensor:
    """transformers' `generate` at temperature 1."""
    model = own.decoder.model
    ids = torch.tensor(begun, device=own.decoder.device)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids))


if __name__ == "__main__":
    main()
