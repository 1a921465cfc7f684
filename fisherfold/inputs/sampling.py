"""What the dense model writes: token ids drawn from its own predictions, many texts in a pass.

A batch is a unit's: its bits depend on the seed and on how its texts begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.network.generation import GreedyDecoder, decode_plainly, left_padded, until_end
from fisherfold.network.models import DTYPES, StaysLoaded, load_model

BATCH = (
    64  # texts written together, at most: 64 are a quarter faster than 32 on two cores, twice the cache of their tokens
)


@dataclass(frozen=True)
class Writer:
    """A model that writes and its tokenizer; the decoder knows whether a cache serves."""

    tokenizer: PreTrainedTokenizerBase
    decoder: GreedyDecoder

    def write(
        self,
        begun: Sequence[list[int]],
        longest: int,
        ends: Sequence[int],
        seed: int,
        temperature: float = 1.0,
        never: Sequence[int] = (),
    ) -> list[list[int]]:
        """What follows each beginning: at most `longest` tokens, drawn in proportion to p^(1/temperature), up to one of `ends`, which is part of it.

        Args:
            never: tokens that are not drawn.
        """
        sample = partial(_with_cache, temperature=temperature, never=never)
        if not self.decoder.caches:
            sample = partial(decode_plainly, choose=partial(_draw, temperature=temperature, never=never))
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(seed)
            return [until_end(row, ends) for row in sample(self.decoder.model, begun, longest, ends)]


@StaysLoaded
def writer(model: Path, dtype: str) -> Writer:
    """The model of a folder, loaded once for all units of a process."""
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    return Writer(tokenizer, GreedyDecoder(load_model(model, DTYPES[dtype]), ends=[]))


def _with_cache(
    model: PreTrainedModel,
    begun: Sequence[list[int]],
    longest: int,
    ends: Sequence[int],
    temperature: float,
    never: Sequence[int],
) -> list[list[int]]:
    """By `generate`."""
    ids, mask = left_padded(begun, model.device)
    model.generation_config = GenerationConfig(  # the model's own would fill what is open: penalties, top-k
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=longest,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        suppress_tokens=list(never) or None,
    )
    generate: Any = model.generate
    return generate(ids, attention_mask=mask)[:, ids.shape[1] :].tolist()


def _draw(logits: torch.Tensor, temperature: float, never: Sequence[int]) -> torch.Tensor:
    """One token of each row's distribution [R]."""
    logits = logits.float() / temperature
    logits[:, list(never)] = -torch.inf
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
