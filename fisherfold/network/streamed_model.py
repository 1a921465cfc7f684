"""A causal language model one part at a time: a skeleton without weights, into which a decoder block, the embedding or the head is read and dropped again.

What has no weights stands in: a tensor of the right shape, dtype and device without numbers of its own. It is nan, so that code which reads an
absent weight does not go on in silence.

Its own code runs it: a block is called with what the model itself calls it with (`BlockCall`), and what lies behind the blocks is the model's own forward
pass in which every block hands on the stored hidden states. So no family is named; one whose blocks need more than hidden states and positions is
refused (`require_blocks`).

Shapes: B sequences of T tokens, h hidden dimensions, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fisherfold.network.blocks import BlockCall, list_blocks
from fisherfold.network.experts import ExpertLinear, unfold_experts
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import DTYPES
from fisherfold.run.checkpoint import StoredTensor, read_tensors
from fisherfold.run.determinism import usable_device
from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.read_ahead import ReadAhead

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Source = Callable[[], torch.Tensor]
"""Reads a tensor."""


@dataclass(frozen=True)
class _Stored:
    """A source: the tensor of a checkpoint, in the dtype and on the device that the model computes with."""

    tensor: StoredTensor
    dtype: torch.dtype
    device: torch.device
    ahead: ReadAhead

    def __call__(self) -> torch.Tensor:
        self.ahead.reached(self.tensor)
        return self.tensor.read().to(self.device, self.dtype)


class StreamedModel:
    """The skeleton of a model, and its weights on disk.

    Args:
        folder: a Hugging Face folder of safetensors with the names of the model's own modules.
        dtype: that it computes in.

    Attributes:
        model: frozen, in evaluation mode; its buffers are there, its weights stand in until they are asked for.
        names: of the decoder blocks.
        blocks: these, by name.
        device: of whatever is read.

    Raises:
        CorruptArtifact: a weight is not in the files.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._tensors, self.dtype = read_tensors(folder), dtype
        self._resident: dict[int, Source] = {}
        self._standing_in: dict[int, tuple[torch.Tensor, Source]] = {}
        device = usable_device()
        self.device = torch.device("cuda" if device == "auto" else device)
        self.model = _skeleton(folder, dtype).eval().requires_grad_(False)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)
        self.blocks = list_blocks(self.model)
        self.names = list(self.blocks)
        self._aliases = _tied_names(self.model)
        self._ahead = ReadAhead(self._parts())
        self._let_stand_in()

    def _parts(self) -> list[list[StoredTensor]]:
        """What is read one after the other: the input embedding, every block, the output embedding if it is another tensor."""
        embeddings = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        names = {id(own): name for name, own in self.model.named_parameters()}
        known = dict.fromkeys(
            names[id(part.weight)] for part in embeddings if id(getattr(part, "weight", None)) in names
        )
        ends = [[self._tensors[alias] for alias in self._aliases[name] if alias in self._tensors] for name in known]
        inside = [
            [tensor for name, tensor in self._tensors.items() if name.startswith(f"{block}.")] for block in self.names
        ]
        return [*ends[:1], *inside, *ends[1:]]

    @property
    def width(self) -> int:
        """h, as the input embedding has it."""
        return input_embedding(self.model).shape[-1]

    @property
    def vocabulary(self) -> int:
        """V, the rows of the input embedding."""
        return len(input_embedding(self.model))

    @contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Inside, one decoder block has its weights, and its own forward pass where the model is run through its blocks."""
        block = self.blocks[self.names[number]]
        replaced, restore = block.__dict__.pop("forward", None), self.fill(block)
        try:
            yield block
        finally:
            restore()
            if replaced is not None:
                block.forward = replaced

    @contextmanager
    def surroundings(self, embedding: bool = False, head: bool = False) -> Iterator[None]:
        """Inside, what lies around the blocks has its weights, the input and the output embedding only if asked for.

        An input embedding without weights gives zeros: enough for masks and positions.
        """
        inputs, outputs = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        absent = {id(inputs)} if not embedding else set()
        absent |= {id(outputs)} if not head else set()
        blocks = self.model.get_submodule(self.names[0].rpartition(".")[0])
        absent |= {id(module) for module in blocks.modules()}
        restore = self.fill(self.model, lambda module: id(module) not in absent)
        if not embedding:
            inputs.forward = lambda ids, *_: torch.zeros(*ids.shape, self.width, dtype=self.dtype, device=self.device)
        try:
            yield
        finally:
            restore()
            inputs.__dict__.pop("forward", None)

    def call(self, number: int, sequences: int, length: int) -> BlockCall:
        """What the model calls a block with for so many sequences; inside `surroundings`."""
        ids = torch.zeros(sequences, length, dtype=torch.long, device=self.device)
        return BlockCall(self.model, self.model.get_submodule(self.names[number]), ids)

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, T, h] that reach the first block for ids [B, T]; inside ``surroundings(embedding=True)``."""
        first = self.model.get_submodule(self.names[0])
        return cast(torch.Tensor, BlockCall(self.model, first, ids.to(self.device)).entered)

    def leave(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, V] of hidden states [B, T, h] that leave the last block; inside ``surroundings(head=True)``."""
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        with self.replaced(lambda number, args, kwargs: hidden):
            return cast(torch.Tensor, self.model(input_ids=ids, use_cache=False).logits)

    @contextmanager
    def replaced(self, forward: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """Inside, the model runs ``forward(number, arguments, keywords)`` in the place of its blocks."""
        for number, block in enumerate(self.blocks.values()):
            block.forward = lambda *args, number=number, **kwargs: forward(number, args, kwargs)
        try:
            yield
        finally:
            for block in self.blocks.values():
                del block.forward

    def fill(self, root: nn.Module, chosen: Callable[[nn.Module], bool] = lambda module: True) -> Callable[[], None]:
        """Read what the chosen modules below `root` lack, tied weights once; return what takes it out again."""
        read: dict[Source, torch.Tensor] = {}
        undo: list[tuple[dict[str, Any], str, Any]] = []
        for module in filter(chosen, root.modules()):
            for kind in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for own, value in list(kind.items()):
                    source = None if value is None else self._source(value)
                    if source is not None:
                        read[source] = read[source] if source in read else source()
                        undo.append((kind, own, value))
                        kind[own] = _like(value, module, own, read[source])
        self._resident |= {_address(values): source for source, values in read.items()}

        def restore() -> None:
            for kind, own, value in undo:
                kind[own] = value
            for values in read.values():
                self._resident.pop(_address(values), None)

        return restore

    def _source(self, value: torch.Tensor) -> Source | None:
        """What reads a parameter or buffer, by what stands in for it; None if nothing does."""
        found = self._standing_in.get(_address(value))
        return found and found[1]

    def _let_stand_in(self) -> None:
        """Put what stands in for it in the place of every tensor that is on the disk; tied ones stay one."""
        made: dict[Source, Any] = {}
        for path, module in self.model.named_modules():
            for kind in (module._parameters, module._buffers):
                for own, value in kind.items():
                    source = None if value is None else self._on_disk(f"{path}.{own}" if path else own, value)
                    if value is None or source is None:
                        continue
                    nothing = self.stand_in(value.shape, value.dtype, source)
                    is_parameter = isinstance(value, nn.Parameter)
                    kind[own] = made.setdefault(
                        source, nn.Parameter(nothing, requires_grad=False) if is_parameter else nothing
                    )

    def _on_disk(self, name: str, value: torch.Tensor) -> Source | None:
        """What reads the tensor of a name, or of one that it is tied to; None of what is not stored.

        Raises:
            CorruptArtifact: the skeleton has no numbers of its own for it.
        """
        found = next((each for each in self._aliases.get(name, [name]) if each in self._tensors), None)
        if found is None and value.is_meta:
            raise CorruptArtifact(
                f"The prepared model holds no weight {name!r}. Write it again with `dvc repro --force --single-item prepare`."
            )
        return None if found is None else _Stored(self._tensors[found], value.dtype, self.device, self._ahead)

    def stand_in(self, shape: torch.Size, dtype: torch.dtype, source: Source) -> torch.Tensor:
        """A tensor without numbers of its own, in whose place `fill` puts what `source` gives; not a number, where the dtype has that."""
        nothing = torch.full((), torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=self.device)
        nothing = nothing.expand(shape)
        self._standing_in[_address(nothing)] = nothing, source  # held, so that nothing else comes to lie there
        return nothing

    def read_again(self, weight: torch.Tensor) -> Source | None:
        """What reads a weight that is in memory once more, or None if the tensor is none; a view of a weight gives a view."""
        source = self._resident.get(_address(weight))
        if source is None or not weight.numel():
            return None
        where = weight.size(), weight.stride(), weight.storage_offset()
        return lambda: source().as_strided(*where)


def is_stand_in(weight: torch.Tensor) -> bool:
    """Whether a weight is not in memory."""
    return weight.dim() > 0 and not any(weight.stride()) and weight.numel() > 1


def _skeleton(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The model with its weights on the meta device, its own buffers, and layers replaced as its configuration says."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import get_hf_quantizer

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    quantizer, config, _ = get_hf_quantizer(config, None, None, True, {})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=dtype, checkpoint_files=[])
    if quantizer is not None:
        quantizer.postprocess_model(model)
    model.tie_weights()
    return model


def _like(value: torch.Tensor, module: nn.Module, own: str, read: torch.Tensor) -> torch.Tensor:
    """What was read as the parameter or buffer that `value` is: an expert's is its part of the stack."""
    part = module.of_stack(own, read) if isinstance(module, ExpertLinear) else read
    return nn.Parameter(part, requires_grad=False) if isinstance(value, nn.Parameter) else part


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter, by each of them."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_parameter.values() for name in names}


@lru_cache(maxsize=1)
def streamed_model(folder: Path, dtype: str) -> StreamedModel:
    """The skeleton of the model in a folder, its experts unfolded, made once a process."""
    streamed = StreamedModel(folder, DTYPES[dtype])
    unfold_experts(streamed.model)
    return streamed
