"""Buffers that no checkpoint holds (causal masks, rotary tables, multipliers), compared with the dense model's after loading.

Transformers makes a model on the meta device, fills in what the files hold, and lets each module set its other buffers. Where a module
does not, they are whatever the memory held, and the model is wrong in silence. Here the compressed model is loaded in each of the ways
that the model card names, with tensors of the right shapes that hold nothing, so that models of any size are checked in little memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import fisherfold.runtime  # noqa: F401  one of the ways of loading
from fisherfold.export.architecture import DenseArchitecture
from fisherfold.run.checkpoint import StoredTensor, read_tensors
from fisherfold.run.errors import InputError


def check_buffers(folder: Path, dense: Mapping[str, StoredTensor], architecture: DenseArchitecture) -> None:
    """Check the checkpoint in `folder` against the dense model, whose tensors have the shapes of `dense`.

    Raises:
        InputError: a buffer differs.
    """
    dense_model = getattr(transformers, architecture.model_class)
    expected = buffers(dense_model, architecture.read_config(), dense)
    classes = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    own_model: Any = get_class_from_dynamic_module(classes["AutoModelForCausalLM"], folder)
    own_config: Any = get_class_from_dynamic_module(classes["AutoConfig"], folder)
    remote = own_model, own_config.from_pretrained(folder)
    registered = dense_model, AutoConfig.from_pretrained(folder)
    tensors = read_tensors(folder)
    for way, (model, config) in {"trust_remote_code": remote, "import fisherfold.runtime": registered}.items():
        _compare(way, buffers(model, config, tensors), expected)


def buffers(
    model: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]
) -> dict[str, torch.Tensor]:
    """The buffers that are in no file, after loading."""
    state = {name: torch.empty((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}
    loaded = model.from_pretrained(None, config=config, state_dict=state)
    return dict(loaded.named_non_persistent_buffers())


def _compare(way: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    wrong = sorted(name for name, values in expected.items() if name not in found or not _same(found[name], values))
    if wrong:
        raise InputError(
            f"Stage 'factorize': loaded with {way}, the compressed model has {len(wrong)} buffers that differ from the dense model's, "
            f"the first {wrong[0]!r}. Transformers does not set them for this architecture, so the model would compute something else. "
            "Please report it with the model's name."
        )


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(found, expected)
