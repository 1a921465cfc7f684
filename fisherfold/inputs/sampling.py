"""What the dense model writes: token ids drawn from its own predictions, many texts in a pass.

A batch is a unit's: its bits depend on the seed and on how its texts begin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fisherfold.inputs.pretrained import positions_of
from fisherfold.network.generation import Decoder
from fisherfold.network.models import DTYPES, StaysLoaded, load_model
from fisherfold.run.determinism import has_bfloat16_units
from fisherfold.run.errors import NumericalError
from fisherfold.run.params import PrepareParams

BATCH = 128  # texts written together, at most: half again as fast as 64 on two cores, twice the cache of their tokens

TRIED = (1, 7, 70)
"""Tokens before the one that a model is tried on; more than the 64 that some compute at once."""


def writing_dtype(params: PrepareParams) -> str:
    """The dtype that the model computes in while it writes."""
    asked = params.writing_dtype
    return asked if asked and has_bfloat16_units() else params.dtype


@dataclass(frozen=True)
class Writer:
    """A model that writes and its tokenizer; the decoder knows whether a cache serves."""

    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder

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
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.decoder.answer(begun, longest, ends, partial(draw, temperature=temperature, never=never))


@StaysLoaded
def writer(folder: Path, dtype: str) -> Writer:
    """The model of a folder, loaded once for all units of a process."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    decoder = Decoder(load_model(folder, DTYPES[dtype]), ends=[])
    if dtype != "float32" and not _writes(decoder):  # some models mix other dtypes with float32
        decoder = Decoder(load_model(folder, torch.float32), ends=[])
    if (
        head := decoder.model.get_output_embeddings()
    ) is not None:  # torch multiplies one token of each text by as many copies of the matrix
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    return Writer(tokenizer, decoder)


def _writes(decoder: Decoder) -> bool:
    """Whether the model writes a token after few and after many: some have code of their own for either."""
    try:
        for length in TRIED:
            if length < (positions_of(decoder.model.config) or length + 1):
                decoder.answer([[0] * length], 1, [], draw)
    except RuntimeError:
        return False
    return True


def draw(logits: torch.Tensor, temperature: float = 1.0, never: Sequence[int] = ()) -> torch.Tensor:
    """One token of each row's distribution [R], of logits [R, V]: the first v with p_1 + ... + p_v >= u, u uniform over (0, 1].

    One random number a row, and sums in float32: a token's chance is p_v to 6e-8. `torch.multinomial`, which asks for V random numbers, takes ten times as long.

    Raises:
        NumericalError: a prediction is not finite.
    """
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    unwanted = [token for token in never if token < logits.shape[-1]]  # some models read tokens that they cannot write
    if unwanted:
        logits = logits.index_fill(1, torch.tensor(unwanted, device=logits.device), -torch.inf)
    sums = logits.softmax(-1).cumsum(-1)
    if sums[:, -1].isnan().any():
        raise NumericalError(
            "Stage 'prepare': while the model writes text, one of its predictions is not finite. Set prepare.dtype: float32, or "
            "prepare.self_written, prepare.free_text and prepare.continued: 0 to let it write none."
        )
    wanted = (1 - torch.rand(len(sums), 1, device=sums.device)) * sums[:, -1:]
    return torch.searchsorted(sums, wanted).squeeze(1)
