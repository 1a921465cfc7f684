"""Stacked right factors: layers that read one input x have them computed by one product.

Layer c of the group needs z_c = right_c x, right_c [r_c, m]. The first layer of the group stores all of them below each other
[Σ r_c, m] as its `down.weight`, and every layer reads its r_c rows of the product from its `start` on. No number more or less is
stored, and calls are fewer: for one token a call costs as much as a small product.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch

from stages.checkpoint import StoredTensor

STACKED = {
    "factors": ("shared_factors", "shared_member"),
    "pivoted_outputs": ("shared_pivoted_outputs", "shared_pivoted_member"),
}
"""Kinds of layers whose right factor meets x itself, and what they become: the first of a stack, and the others."""


def stack_layers(groups: Iterable[Sequence[str]], layers: Mapping[str, dict]) -> dict[str, dict]:
    """The low-rank layers of a checkpoint's configuration, by name, with stacks.

    Args:
        groups: names of layers that read one input; dense ones are skipped, and those whose right factor meets another order of x.
    """
    found = dict(layers)
    for group in groups:
        names = [name for name in group if layers.get(name, {}).get("kind") in STACKED]
        if len(names) < 2:
            continue
        first, *_ = names
        ends = list(accumulate(layers[name]["rank"] for name in names))
        for name, end in zip(names, ends, strict=True):
            head, member = STACKED[layers[name]["kind"]]
            own = {"kind": head, "height": ends[-1]} if name == first else {"kind": member, "source": first}
            found[name] = layers[name] | own | {"start": end - layers[name]["rank"]}
    return found


def stack_tensors(layers: Mapping[str, dict], tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The checkpoint's tensors with the right factors stacked as `layers`, of `stack_layers`, have them."""
    found = dict(tensors)
    for first, layer in layers.items():
        if "height" in layer:
            names = [first, *(name for name, other in layers.items() if other.get("source") == first)]
            rights = [found.pop(f"{name}.down.weight") for name in names]
            shape = layer["height"], rights[0].shape[1]
            found[f"{first}.down.weight"] = StoredTensor(shape, rights[0].dtype, partial(_read_stack, rights))
    return found


def _read_stack(rights: Sequence[StoredTensor]) -> torch.Tensor:
    return torch.cat([right.read() for right in rights])
