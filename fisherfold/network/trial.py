"""What a few passes over text show of a model's linear layers: who is called, computes W x + b, gets a gradient, is read by others.

Names and classes tell none of this: a subclass of nn.Linear may return a tuple, a tower for images may stand idle, a kernel may take
a layer's weight and never call it. So each layer is watched while the model runs as it is measured (a loss and its gradients), as it
is trained, and as it writes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import forward_hooks, removed
from fisherfold.network.shortcuts import attempt
from fisherfold.run.errors import InputError, first_line

WRITTEN = 3  # tokens: the first without a cache, the others with one
ROUNDINGS = 1024  # of the dtype, in the norm: another order of the sums moves y by a few, another function by far more
DECODER_SETTINGS = ("is_decoder", "causal")  # the second of XLM
LEAST_MOVE = 1e-5  # of the deviation of the logits, in the mean; rounding moves causal models by less than 1e-6
CHOICES = {
    getattr(owner, name)
    for name in ("topk", "argmax", "sort", "argsort", "multinomial", "kthvalue")
    for owner in (torch, torch.Tensor)
}
PRODUCTS = (
    "MmBackward",
    "AddmmBackward",
    "BmmBackward",
    "BaddbmmBackward",
    "LinearBackward",
    "MvBackward",
    "EmbeddingBackward",
)


@dataclass
class Trial:
    """The linear layers of which something holds, by name; `reads` has every input of every call, held.

    Attributes:
        called: computed something, in the order of their last calls.
        strange: gave something else than W x + b.
        reached: got a gradient.
        read_elsewhere: other code looked up `.weight`.
        chosen_from: a choice (top k, arg max) was made among the outputs.
        running: all modules that were called, linear or not.
        moved: whether any of those gradients was other than zero.
    """

    reads: dict[str, list[torch.Tensor]]
    called: dict[str, None] = field(default_factory=dict)
    strange: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    read_elsewhere: set[str] = field(default_factory=set)
    chosen_from: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    moved: bool = False

    def reach(self, name: str, gradient: torch.Tensor) -> None:
        """Note that a gradient comes to a layer's output."""
        self.reached.add(name)
        self.moved = self.moved or bool(gradient.any())

    @property
    def last(self) -> str | None:
        """The layer that was called last."""
        return next(reversed(self.called), None)


def try_layers(model: PreTrainedModel, modules: dict[str, nn.Module], ids: torch.Tensor) -> Trial:
    """Watch `modules`, linear layers by name, while the frozen model runs over `ids` [B, T].

    Raises:
        InputError: the model gives no loss or no gradient of a plain pass over token ids, or its logits depend on later tokens.
    """
    trial = Trial({name: [] for name in modules})
    maps = {name: LinearMap.of(module) for name, module in modules.items()}
    with _weights_watched(modules, trial.read_elsewhere):
        choices = ChoiceWatch(trial.chosen_from)
        with _measured_calls(modules, maps, trial, choices), _running_modules(model, trial.running), choices:
            _plain_pass(model, ids)
        _require_gradient(model, trial)
        _require_causal(model, ids)
        with _further_calls(modules, maps, trial), torch.no_grad():
            with _training(model):
                attempt(lambda: model(input_ids=ids, use_cache=False))
            generate: Any = model.generate
            attempt(lambda: generate(ids[:1], max_new_tokens=WRITTEN, do_sample=False, pad_token_id=0))
    return trial


@dataclass(frozen=True)
class LinearMap:
    """What a layer should compute: y = W x + b with W [n, m]. Layers whose code is torch's or transformers' own are `believed`.

    The weight is looked up when it is needed, for it may be in memory only then, and past the module's class, which notes who asks for it.
    """

    parameters: Mapping[str, torch.Tensor | None]
    transposed: bool
    believed: bool

    @classmethod
    def of(cls, module: nn.Module) -> "LinearMap":
        """What a module with the weight of a linear layer should compute."""
        believed = type(module) in (nn.Linear, Conv1D) and "forward" not in vars(module)
        return cls(module._parameters, not isinstance(module, nn.Linear), believed)

    @torch.no_grad()
    def gives(self, x: object, y: object) -> bool:
        """Whether y is the map of x."""
        weight = cast(torch.Tensor, self.parameters["weight"])
        weight = weight.T if self.transposed else weight
        n, m = weight.shape
        if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
            return False
        if self.believed or x.shape[-1:] != (m,) or y.shape != (*x.shape[:-1], n):
            return self.believed
        expected = nn.functional.linear(x.to(weight.dtype), weight, self.parameters["bias"]).double()
        return bool((y - expected).norm() <= ROUNDINGS * torch.finfo(y.dtype).eps * expected.norm())


def _plain_pass(model: PreTrainedModel, ids: torch.Tensor) -> None:
    try:
        result = gradient_pass(model, ids)
    except Exception as error:
        logging.getLogger(__name__).debug("the plain pass failed", exc_info=True)
        raise InputError(
            f"{type(model).__name__} cannot be measured: a pass over token ids alone, with the gradient of its loss, fails "
            f"({type(error).__name__}: {first_line(error)}). Choose a model that reads text by itself."
        ) from error
    if not result.finite.all():
        raise InputError(
            f"{type(model).__name__} gives no finite loss, or no finite gradient of it, on {ids.numel()} tokens of its own vocabulary"
            f"{_odd_settings(model)}. See that the checkpoint predicts text at all; in float16 or bfloat16 it may overflow (prepare.dtype: float32)."
        )


def _odd_settings(model: PreTrainedModel) -> str:
    """Values of the configuration that are not finite, as half a sentence."""
    values = {**model.config.get_text_config().to_dict(), **model.config.to_dict()}
    odd = [f"{key} = {value}" for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    return f" (in its config.json: {', '.join(odd)})" if odd else ""


def _require_gradient(model: PreTrainedModel, trial: Trial) -> None:
    """Refuse a model whose loss hangs on nothing that it computes."""
    if trial.reached and not trial.moved:
        zero = [name for name, weight in model.named_parameters() if weight.dim() > 1 and not weight.any()][:3]
        why = f"every number of {', '.join(zero)} is zero" if zero else "its logits do not hang on its text"
        raise InputError(
            f"{type(model).__name__} gets no gradient that is not zero, so nothing tells which weights matter: {why}{_odd_settings(model)}. "
            "See that the checkpoint is whole, and trained."
        )


@torch.no_grad()
def _require_causal(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Refuse a model whose logits for a beginning are others when other text follows, of the same length: some choose by that."""
    half = ids.shape[1] // 2
    others = torch.cat([ids[:, :half], ids[:, : ids.shape[1] - half]], dim=1)
    here, there = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, others))
    allowed = max(LEAST_MOVE, 4 * torch.finfo(here.dtype).eps)
    moved, scale = (here[:, :half] - there[:, :half]).float().abs().mean(), here.float().std()
    if moved > allowed * scale:
        raise InputError(
            f"{type(model).__name__} reads what comes after a token: its logits for {half} tokens move by {moved / scale:.2g} of their "
            f"deviation when others follow, so it predicts nothing. Choose a causal model{_switches(model.config)}."
        )


def _switches(config: PreTrainedConfig) -> str:
    """What makes a decoder of an encoder, in words, if its family has such a setting."""
    off = [f"`{name}: true`" for name in DECODER_SETTINGS if getattr(config, name, None) is False]
    return f", or set {' and '.join(off)} in its config.json if it was trained as one" if off else ""


@contextmanager
def _measured_calls(
    modules: dict[str, nn.Module], maps: dict[str, LinearMap], trial: Trial, choices: "ChoiceWatch"
) -> Iterator[None]:
    """Fill the trial from a pass with gradients."""

    def after(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        trial.called.pop(name, None)
        trial.called[name] = None
        if not maps[name].gives(x, y):
            trial.strange.add(name)
            return
        trial.reads[name].append(x)
        if y.requires_grad:
            choices.outputs[y.grad_fn] = name, y.numel()
            y.register_hook(partial(trial.reach, name))

    with forward_hooks(modules, after):
        yield


@contextmanager
def _further_calls(modules: dict[str, nn.Module], maps: dict[str, LinearMap], trial: Trial) -> Iterator[None]:
    """Note which layers are strange in other passes."""

    def after(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if not maps[name].gives(x, y):
            trial.strange.add(name)

    with forward_hooks(modules, after):
        yield


@contextmanager
def _running_modules(model: nn.Module, running: set[str]) -> Iterator[None]:
    """Add the names of all modules that are called."""

    def note(name: str) -> Callable[..., None]:
        return lambda *_: running.add(name)

    with removed(module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()):
        yield


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """In training mode, with the random state and the buffers put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    with torch.random.fork_rng(devices=[]):
        model.train()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def _weights_watched(modules: dict[str, nn.Module], read: set[str]) -> Iterator[None]:
    """Inside, names of modules whose `.weight` is looked up while they are not computing are added to `read`."""
    computing: set[str] = set()
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: computing.add(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_, name=name: computing.discard(name)))
        module.__class__ = _watched(type(module), name, computing, read)
    try:
        with removed(handles):
            yield
    finally:
        for module in modules.values():
            module.__class__ = type(module).__mro__[1]


def _watched(kind: type[nn.Module], name: str, computing: set[str], read: set[str]) -> type[nn.Module]:
    """A subclass that is `kind` in all but that it notes who looks up its weight."""

    def look_up(self: nn.Module, attribute: str) -> object:
        if attribute == "weight" and name not in computing:
            read.add(name)
        return kind.__getattr__(self, attribute)

    return type(kind.__name__, (kind,), {"__getattr__": look_up, "__module__": kind.__module__})


class ChoiceWatch(TorchFunctionMode):
    """Notes linear layers among whose outputs, or what elementwise functions make of them, a choice is made.

    Attributes:
        outputs: by node of the autograd graph, the layer that made it and of how many numbers.
        chosen_from: gets the layers.
    """

    def __init__(self, chosen_from: set[str]) -> None:
        super().__init__()
        self.outputs: dict[object, tuple[str, int]] = {}
        self.chosen_from = chosen_from

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CHOICES:
            self._note(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def _note(self, scores: torch.Tensor) -> None:
        """Go back from the scores to the products that they are made of."""
        pending, seen = [scores.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            name, numbers = self.outputs.get(node, ("", 0))
            if name and numbers == scores.numel():
                self.chosen_from.add(name)
            if not name and not node.name().startswith(PRODUCTS):
                pending += [earlier for earlier, _ in node.next_functions]
