"""Low-rank experts in a model that is trained, and taken out of it again.

A stack lies in the model as it lies in the checkpoint, in classes of one kind and rank (see ``fisherfold.export.expert_tensors``); what has been
trained goes back to every expert's own tensors, and experts that stay dense back to their stack.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fisherfold.export.expert_tensors import NAMES, Stack, expert_records
from fisherfold.run.checkpoint import StoredTensor, write_tensors
from fisherfold.runtime.modeling_fisherfold_experts import SHARED, replace_experts

DENSE = "dense"  # the kind of a class


def put_experts(
    module: nn.Module,
    prefix: str,
    dense: PreTrainedModel,
    stacks: Sequence[Stack],
    changed: Mapping[str, StoredTensor],
) -> None:
    """Put low-rank stacks into `module`, a copy of the dense model or of its part of that prefix.

    Args:
        changed: stacks whose dense experts are no longer those of the dense model.
    """
    records = expert_records(dense, stacks)
    matrices = {
        stack.name: changed.get(stack.name) or StoredTensor.of(dense.get_parameter(stack.name).data) for stack in stacks
    }
    replace_experts(module, {name.removeprefix(prefix): record for name, record in records.items()})
    tensors = {name: t for stack in stacks for name, t in stack.tensors(matrices[stack.name], torch.float32).items()}
    module.load_state_dict({name.removeprefix(prefix): tensor.read() for name, tensor in tensors.items()}, strict=False)
    for stack in stacks:
        module.get_submodule(stack.name.rpartition(".")[0].removeprefix(prefix)).to(
            dense.get_parameter(stack.name).device
        )


def factor_names(stacks: Iterable[Stack]) -> Iterator[str]:
    """Beginnings of the names of what a model holds of factorized experts."""
    for stack in stacks:
        for number, (kind, _) in enumerate(stack.classes):
            if kind != DENSE:
                yield f"{stack.prefix}{number}."


def take_experts(
    folder: Path, state: dict[str, torch.Tensor], prefix: str, dense: nn.Module, stacks: Sequence[Stack]
) -> dict[str, torch.Tensor]:
    """Write the tensors of each factorized expert below `folder`; all of a stack is taken out of `state`, whose names lack `prefix`.

    Returns:
        The stacks in which some experts stay dense, as the dense model has them, by its names.
    """
    mixed: dict[str, torch.Tensor] = {}
    for stack in stacks:
        state.pop(stack.name.removeprefix(prefix), None)
        for number, (kind, rank) in enumerate(stack.classes):
            own = f"{stack.prefix}{number}.".removeprefix(prefix)
            parts = {key.removeprefix(own): state.pop(key) for key in list(state) if key.startswith(own)}
            members = [expert for expert, each in enumerate(stack.kinds) if each == (kind, rank)]
            if kind == DENSE:
                whole = mixed.setdefault(
                    stack.name, dense.get_parameter(stack.name.removeprefix(prefix)).detach().cpu().clone()
                )
                whole[members] = parts["weight"].mT if stack.layers[0].transposed else parts["weight"]
            else:
                _write_class(folder, stack, members, parts, kind)
    return mixed


def _write_class(
    folder: Path, stack: Stack, members: Sequence[int], parts: Mapping[str, torch.Tensor], kind: str
) -> None:
    """The tensors of each expert of a class, under the names that it has alone; what they share lies with the first."""
    for place, expert in enumerate(members):
        names = {NAMES[name]: name for name in stack.found[expert].factors}
        tensors = {
            name: parts[own] if own in SHARED.get(kind, ()) else parts[own][place] for own, name in names.items()
        }
        own_folder = folder / stack.layers[expert].name
        own_folder.mkdir(parents=True)
        write_tensors(own_folder, {name: StoredTensor.of(values.contiguous()) for name, values in tensors.items()})
