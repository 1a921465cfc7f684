"""The targeted layers of the prepared model, found by trying it on tokens of its own tokenizer: a unit of stage `prepare`.

layers.json          the targets, which later stages read
dense_layers.json    {name: why} of every other linear layer
coverage.json        see `fisherfold.network.coverage`
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.network.coverage import measure_coverage
from fisherfold.network.experts import unfold_experts, unknown_stacks
from fisherfold.network.layers import input_embedding, write_dense_layers, write_layers
from fisherfold.network.models import load_model
from fisherfold.network.targets import find_targets
from fisherfold.run.errors import InputError

TOKENS = 32


def write_targets(
    folder: Path,
    model: Path,
    dtype: str,
    sequence_length: int,
    gates: Sequence[str],
    experts: str = "layers",
) -> None:
    """Unit of work: write the three files into `folder`.

    Raises:
        InputError: the model cannot be measured, or has nothing to compress; see `find_targets`.
    """
    # float16 overflows where bfloat16 does not, and what is looked for here is no number
    try:
        loaded = load_model(model, torch.float32 if dtype == "float32" else torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (ImportError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"Transformers cannot load what it has saved of the model itself ({type(error).__name__}: {next(iter(str(error).splitlines()), '')}). "
            "Choose another model, or another version of transformers."
        ) from error
    weight = input_embedding(loaded)
    ids = text_tokens(tokenizer, len(weight), min(TOKENS, sequence_length))
    open_experts(loaded, experts)
    targets = find_targets(loaded, torch.tensor([ids], device=weight.device), gates)
    write_layers(folder, targets.layers)
    write_dense_layers(folder, targets.dense)
    coverage = json.dumps(measure_coverage(loaded, targets, unknown_stacks(loaded)), indent=1, sort_keys=True)
    (folder / "coverage.json").write_text(coverage + "\n", encoding="utf-8")


def open_experts(model: PreTrainedModel, experts: str) -> None:
    """Unfold the experts of a mixture, as prepare.experts says: `layers` those of a known layout, `all` no other, `dense` none.

    Raises:
        InputError: all are asked for, and a layout is unknown.
    """
    if experts == "all" and (unknown := unknown_stacks(model)):
        raise InputError(
            f"{type(model).__name__} holds experts in a layout that is not known here: {', '.join(unknown)}. Set prepare.experts: layers, "
            "which leaves them dense."
        )
    if experts != "dense":
        unfold_experts(model)


def text_tokens(tokenizer: PreTrainedTokenizerBase, embeddings: int, count: int) -> list[int]:
    """`count` tokens that are text (neither special nor added later: images, tools) and embedded, spread over the vocabulary."""
    others = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    words = sorted({index for index in tokenizer.get_vocab().values() if index < embeddings} - others) or [0]
    return [words[place * len(words) // count % len(words)] for place in range(count)]
