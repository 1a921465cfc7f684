"""One of the two models as the units of an evaluation run it: where it lies, what it computes in, how much at a time."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import fisherfold.runtime  # noqa: F401  checkpoints of ours are loaded by its classes, never by code from their folder
from fisherfold.network.generation import Decoder
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import DTYPES, StaysLoaded, load_model
from fisherfold.network.overflow import first_overflow
from fisherfold.run.errors import InputError, NumericalError

OVERFLOW_CURES = {"float16": "float16 ends at 65,504: set evaluate.dtype to float32 or bfloat16."}


@dataclass(frozen=True)
class ModelRun:
    """
    Attributes:
        folder: its Hugging Face folder.
        dtype: what it computes in; probabilities are float32.
        batch_size: sequences in one forward pass.
        pass_tokens: tokens in one forward pass over rows of any length: as many as a batch of sequences has, so memory is alike.
        cure: what to do where its weights are at fault.
    """

    folder: Path
    dtype: str
    batch_size: int
    pass_tokens: int
    cure: str

    @property
    def model(self) -> PreTrainedModel:
        """The model in memory; it stays there from unit to unit."""
        return _in_memory(self).model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The one that lies in its folder."""
        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @property
    def decoder(self) -> Decoder:
        """What writes its greedy answers."""
        return _in_memory(self).decoder

    @property
    def vocabulary(self) -> int:
        """Rows of its input embedding."""
        return input_embedding(self.model).shape[0]

    @property
    def positions(self) -> int | None:
        """The longest sequence that it can read, where its configuration says so."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if positions and positions > 0 else None  # xlnet says -1


class _InMemory:
    def __init__(self, run: ModelRun) -> None:
        self.run, self.model = run, load_model(run.folder, DTYPES[run.dtype])

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model, end_tokens(self.run.folder, self.run.tokenizer))


@StaysLoaded
def _in_memory(run: ModelRun) -> _InMemory:
    return _InMemory(run)


def forget_models() -> None:
    """Free the memory of all models."""
    _in_memory.cache_clear()


def end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's own and those of the model's generation settings, sorted."""
    ends = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").exists():
        named = GenerationConfig.from_pretrained(folder).eos_token_id
        ends |= {*named} if isinstance(named, list) else {named}
    return sorted(ends - {None})


def common_vocabulary(dense: ModelRun, compressed: ModelRun) -> int:
    """The vocabulary of both models.

    Raises:
        InputError: they differ.
    """
    if dense.vocabulary != compressed.vocabulary:
        raise InputError(
            f"The dense model knows {dense.vocabulary} tokens and the compressed one {compressed.vocabulary}: run stage "
            "'factorize' again."
        )
    return dense.vocabulary


def not_finite(unit: str, run: ModelRun, what: str, ids: torch.Tensor) -> NumericalError:
    """An error that names the layer where a pass over `ids` [B, T] ceases to be finite, and what helps."""
    place = first_overflow(run.model, ids)
    cure = OVERFLOW_CURES.get(run.dtype) or run.cure
    return NumericalError(
        f"Stage 'evaluate', unit {unit!r}: {what} is not finite with the model in {run.folder}. "
        f"{place or 'No single layer makes such a number of finite ones.'} {cure} Finished units are kept."
    )
