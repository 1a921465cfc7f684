"""The linear layers of a causal language model, found from the model itself."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fisherfold.network.experts import ExpertLinear
from fisherfold.run.errors import CorruptArtifact, InputError

if TYPE_CHECKING:  # seconds, which a stage that loads no model need not spend
    from transformers import PreTrainedModel

LAYERS_FILE = "layers.json"
DENSE_FILE = "dense_layers.json"
LAYER_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-]*(\.[A-Za-z0-9_][A-Za-z0-9_\-]*)*")
PROBE_LENGTH = 8  # tokens of the pass that shows which layers share an input


NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)|(?<=\.)\d+$")
"""In a module's name: of a block or an expert."""


def kind_of(name: str) -> str:
    """The name of a module with every number in it as ``*``: ``model.layers.*.mlp.up_proj``."""
    return NUMBER.sub("*", name)


@dataclass(frozen=True)
class LinearLayer:
    """One targeted linear layer.

    Attributes:
        name: the module's dotted name in the model.
        outputs: n.
        inputs: m.
        bias: whether it has one.
        transposed: whether its weight is stored [m, n] (GPT-2's Conv1D) and not [n, m].
        group: name of the first layer that reads the same input tensor; layers of one group share Σ x xᵀ.
        stack: of an expert, the tensor [E, n, m] (or [E, m, n]) whose matrix of its own number it is; see ``fisherfold.network.experts``.
            Its bias stays in a stack of its own, so `bias` is false.
    """

    name: str
    outputs: int
    inputs: int
    bias: bool
    transposed: bool
    group: str
    stack: str | None = None

    @property
    def dense_numbers(self) -> int:
        """n m."""
        return self.outputs * self.inputs

    @property
    def tensor(self) -> str:
        """The tensor of the dense model that holds the weight."""
        return self.stack or f"{self.name}.weight"

    @property
    def expert(self) -> int:
        """The number of an expert in its stack."""
        return int(self.name.rpartition(".")[2])


def find_layers(model: "PreTrainedModel") -> list[LinearLayer]:
    """Every nn.Linear and Conv1D of the model but the output embedding, in the order of its modules.

    Layers are grouped by the very tensor that they read in one small forward pass, so no name is looked at. A layer that
    this pass does not reach (an expert that no token is routed to) is a group of its own.

    Raises:
        InputError: the model has no such layer, or one whose name cannot become a path.
    """
    modules = linear_modules(model)
    if not modules:
        raise InputError(
            f"{type(model).__name__} has no linear layers besides its output embedding: nothing to compress."
        )
    return describe_layers(modules, _read_inputs(model, modules))


def describe_layers(modules: Mapping[str, nn.Module], reads: Mapping[str, Sequence[torch.Tensor]]) -> list[LinearLayer]:
    """Linear layers by name as `LinearLayer`s; those with the same tensors in the same order in `reads` are a group.

    Raises:
        InputError: a name cannot become a path.
    """
    first: dict[tuple[int, ...], str] = {}
    groups = {name: first.setdefault(tuple(map(id, reads[name])), name) if reads[name] else name for name in modules}
    return [_describe(name, module, groups[name]) for name, module in modules.items()]


def linear_modules(model: "PreTrainedModel") -> dict[str, nn.Module]:
    """The modules behind `find_layers`, by name; modules that carry an embedding's weight are not among them."""
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(module.weight) for module in ends if module}
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or _is_transposed(module)) and id(module.weight) not in embeddings
    }


@contextmanager
def removed(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there inside and no longer."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forward_hooks(
    modules: dict[str, nn.Module], hook: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Call `hook(name, input, output)` at every forward pass of one of `modules`."""

    def listen(name: str) -> Callable[..., Any]:
        def after(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: torch.Tensor
        ) -> None:
            hook(name, arguments[0] if arguments else next(iter(keywords.values())), output)

        return after

    with removed(module.register_forward_hook(listen(name), with_kwargs=True) for name, module in modules.items()):
        yield


@contextmanager
def input_gradient_hooks(
    groups: Mapping[str, Sequence[nn.Module]], hook: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `hook(group, g)` with g, the sum of the gradients that the modules of a group send to the input they share.

    The modules are given one view of their input, so what other readers of the tensor (a residual) send is not in g.
    """
    views: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def view(group: str, x: torch.Tensor) -> torch.Tensor:
        if group not in views or views[group][0] is not x:
            views[group] = (x, x.view_as(x))
            if x.requires_grad:
                views[group][1].register_hook(lambda g: hook(group, g))
        return views[group][1]

    def before(group: str) -> Callable[..., Any]:
        def give_view(
            module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if arguments:
                return (view(group, arguments[0]), *arguments[1:]), keywords
            name = next(iter(keywords))
            return arguments, {**keywords, name: view(group, keywords[name])}

        return give_view

    with removed(
        module.register_forward_pre_hook(before(group), with_kwargs=True)
        for group, modules in groups.items()
        for module in modules
    ):
        yield


def layer_modules(model: nn.Module, layers: Iterable[LinearLayer]) -> dict[str, nn.Module]:
    """The modules behind layers, by name.

    Raises:
        CorruptArtifact: the model has no such module.
    """
    try:
        return {layer.name: model.get_submodule(layer.name) for layer in layers}
    except AttributeError as error:
        raise CorruptArtifact(
            f"{LAYERS_FILE} was written for another model ({error}). Write it with `dvc repro --force --single-item prepare`."
        ) from None


def by_group(layers: Iterable[LinearLayer]) -> dict[str, list[LinearLayer]]:
    """Layers by the group that shares an input, in model order."""
    groups: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return groups


def input_embedding(model: "PreTrainedModel") -> torch.Tensor:
    """The input embedding's weight [V, h]: its rows are the vocabulary, its device is where token ids go."""
    return cast(torch.Tensor, model.get_input_embeddings().weight)


@torch.no_grad()
def _read_inputs(model: "PreTrainedModel", modules: dict[str, nn.Module]) -> dict[str, list[torch.Tensor]]:
    """The tensors that each layer reads in one small pass, held, so that no two share an address."""
    reads: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    embedding = input_embedding(model)
    ids = torch.arange(PROBE_LENGTH, device=embedding.device)[None] % len(embedding)
    with forward_hooks(modules, lambda name, x, output: reads[name].append(x)):
        model(input_ids=ids, use_cache=False)
    return reads


def _describe(name: str, module: Any, group: str) -> LinearLayer:
    if not LAYER_NAME.fullmatch(name):
        raise InputError(f"The model has a linear layer called {name!r}, a name that cannot become a path.")
    outputs, inputs = module.weight.shape
    if isinstance(module, ExpertLinear):
        return LinearLayer(name, outputs, inputs, False, module.transposed, group, name.rpartition(".")[0])
    transposed = _is_transposed(module)
    outputs, inputs = (inputs, outputs) if transposed else (outputs, inputs)
    return LinearLayer(name, outputs, inputs, module.bias is not None, transposed, group)


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def write_layers(folder: Path, layers: Sequence[LinearLayer]) -> None:
    """Write layers.json into `folder`."""
    known = [{key: value for key, value in asdict(layer).items() if value is not None} for layer in layers]
    text = json.dumps(known, indent=1, sort_keys=True)
    (folder / LAYERS_FILE).write_text(text + "\n", encoding="utf-8")


def read_layers(folder: Path) -> list[LinearLayer]:
    """Read layers.json of a stage's output.

    Raises:
        CorruptArtifact: it is missing or not readable, or holds a name that must not become a path.
    """
    try:
        layers = [LinearLayer(**fields) for fields in json.loads((folder / LAYERS_FILE).read_text(encoding="utf-8"))]
        names = [name for layer in layers for name in (layer.name, layer.group, layer.stack or layer.name)]
        bad = [name for name in names if not LAYER_NAME.fullmatch(name)]
    except (OSError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{folder / LAYERS_FILE} is not readable ({error}). Run its stage again.") from None
    if bad:
        raise CorruptArtifact(f"{folder / LAYERS_FILE} holds {bad[0]!r}, which is not the name of a module.")
    return layers


def write_dense_layers(folder: Path, reasons: Mapping[str, str]) -> None:
    """Write dense_layers.json into `folder`: of every linear layer that is no target, why it stays dense."""
    text = json.dumps(dict(reasons), indent=1, sort_keys=True)
    (folder / DENSE_FILE).write_text(text + "\n", encoding="utf-8")


def read_dense_layers(folder: Path) -> dict[str, str]:
    """Read dense_layers.json of stage `prepare`.

    Raises:
        CorruptArtifact: it is missing or not readable.
    """
    try:
        return dict(json.loads((folder / DENSE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptArtifact(f"{folder / DENSE_FILE} is not readable ({error}). Run stage 'prepare' again.") from None
