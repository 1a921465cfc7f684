"""The experts of a mixture as linear layers: a model whose stacked matrices [E, n, m] are unfolded runs each expert's matrix as a module.

Transformers keeps the matrices of E experts in one parameter, and most families run them through one interface
(`use_experts_implementation`), whose flags say how they lie. Unfolded, the parameter `mlp.experts.gate_up_proj` becomes a list of E linear
layers `mlp.experts.gate_up_proj.3`, whose weights are views of the parameter and whose inputs are the tokens that the router sends there:
hooks, statistics and soft ranks see experts as they see any layer. What the model computes is the same but for the order of its sums.

A layout is an entry of LAYOUTS. A module with stacked matrices that fits none stays as it is, see `unknown_stacks`.

Shapes: E experts of n outputs and m inputs, N tokens of which each goes to k experts.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from fisherfold.run.registry import Registry


class ExpertLinear(nn.Linear):
    """One expert's matrix: y = W x + b, W [n, m] a view of its place in the stack.

    Attributes:
        number: its place in the stack.
        transposed: whether the stack holds it as [m, n].
        rows: which tokens of the batch, numbered through its sequences, the last call read.
    """

    def __init__(self, number: int, matrix: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> None:
        nn.Module.__init__(self)
        weight = matrix.T if transposed else matrix
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.number, self.transposed = number, transposed
        self.rows: torch.Tensor | None = None

    def of_stack(self, own: str, stack: torch.Tensor) -> torch.Tensor:
        """Its part of the stack of weights or of biases."""
        return stack[self.number].T if own == "weight" and self.transposed else stack[self.number]


def _read(expert: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What an expert's matrix, or what has been put in its place, makes of x, the tokens `rows`."""
    expert.rows = rows
    return expert(x)


class ExpertStack(nn.ModuleList):
    """The E matrices of one stack, in the place of its parameter."""

    def __init__(self, matrices: torch.Tensor, biases: torch.Tensor | None, transposed: bool) -> None:
        parts = [None] * len(matrices) if biases is None else biases.data
        pairs = zip(matrices.data, parts, strict=True)
        super().__init__(ExpertLinear(number, *pair, transposed) for number, pair in enumerate(pairs))


@dataclass(frozen=True)
class Layout:
    """How a kind of module holds and runs its experts.

    Attributes:
        name: of the entry, which a checkpoint's config.json has.
        fits: whether a module is of this kind.
        stacks: names of its stacked parameters, in the order in which they are used.
        transposed: whether they are [E, m, n].
        forward: what it computes, from unfolded stacks.
    """

    name: str
    fits: Callable[[Any], bool]
    stacks: Callable[[Any], tuple[str, str]]
    transposed: Callable[[Any], bool]
    forward: Callable[..., torch.Tensor]


LAYOUTS: Registry[Layout] = Registry("layout of experts")


def _through_interface(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Σ_k weight_k expert_k(x) for x [N, m], the experts [N, k] that a router chose and their weights [N, k]."""
    chosen = top_k_index.shape[-1]
    expert_of = top_k_index.reshape(-1)
    first, last = (getattr(self, name) for name in _interface_stacks(self))
    parts, places = [torch.zeros_like(hidden_states[:0])], [expert_of[:0]]
    for expert in range(len(first)):
        here = torch.nonzero(expert_of == expert)[:, 0]
        if len(here):
            rows = torch.div(here, chosen, rounding_mode="floor")
            made = _read(first[expert], hidden_states[rows], rows)
            made = self._apply_gate(made) if self.has_gate else self.act_fn(made)
            made = _read(last[expert], made, rows)
            parts.append(self.post_expert_norm(made) if self.has_post_expert_norm else made)
            places.append(here)
    place, made = torch.cat(places), torch.cat(parts)
    weighted = made * top_k_weights.reshape(-1)[place, None]
    order = torch.empty_like(place)
    order[place] = torch.arange(len(place), device=place.device)
    return weighted[order].view(len(hidden_states), chosen, -1).sum(1).to(hidden_states.dtype)


def _interface_stacks(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _fits_interface(module: Any) -> bool:
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_post_expert_norm"):
        return False
    return _holds_exactly(module, _interface_stacks(module))


LAYOUTS.register("interface")(
    Layout("interface", _fits_interface, _interface_stacks, lambda module: module.is_transposed, _through_interface)
)


def _every_token_everywhere(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """What each expert makes of its own copy of all tokens, [E N, m], which is zero where the router did not choose it, as its output is."""
    copies = hidden_states.view(len(self.gate_up_proj), -1, hidden_states.shape[-1])
    made = []
    for first, last, copy in zip(self.gate_up_proj, self.down_proj, copies, strict=True):
        rows = torch.nonzero(copy.detach().any(-1))[:, 0]
        own = torch.zeros_like(copy)
        if len(rows):
            gate, up = _read(first, copy[rows], rows).chunk(2, dim=-1)
            own = own.index_copy(0, rows, _read(last, up * self.act_fn(gate), rows))
        made.append(own)
    return torch.cat(made)


def _takes_copies(module: Any) -> bool:
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    fused = ("gate_up_proj", "down_proj")
    if names != ["hidden_states"] or not hasattr(module, "act_fn") or not _holds_exactly(module, fused):
        return False
    first, last = (module.get_parameter(name).shape for name in fused)
    return (first[1], first[2]) == (last[2], 2 * last[1])


LAYOUTS.register("copies")(
    Layout(
        "copies",
        _takes_copies,
        lambda module: ("gate_up_proj", "down_proj"),
        lambda module: True,
        _every_token_everywhere,
    )
)


def _holds_exactly(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the stacked matrices of a module are these."""
    return {name for name, own in module.named_parameters(recurse=False) if own.dim() == 3} == set(names)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    """The modules whose experts can be unfolded, by name, with their layouts."""
    for name, module in model.named_modules():
        for layout in LAYOUTS:
            if LAYOUTS.lookup(layout).fits(module):
                yield name, module, LAYOUTS.lookup(layout)
                break


def unknown_stacks(model: nn.Module) -> dict[str, int]:
    """Stacked matrices that no layout knows, by the name of their parameter, with E."""
    known = {id(module) for _, module, _ in expert_modules(model)}
    return {
        f"{name}.{own}": len(matrices)
        for name, module in model.named_modules()
        if id(module) not in known and not isinstance(module, nn.modules.conv._ConvNd)
        for own, matrices in module.named_parameters(recurse=False)
        if matrices.dim() == 3 and min(matrices.shape[1:]) > 1 < len(matrices)
    }


def unfold_experts(model: nn.Module) -> None:
    """Unfold the experts of a frozen model in place. Their numbers stay where they are."""
    for _, module, layout in list(expert_modules(model)):
        transposed = layout.transposed(module)
        for name in layout.stacks(module):
            matrices, biases = module.get_parameter(name), module._parameters.pop(f"{name}_bias", None)
            delattr(module, name)
            module.add_module(name, ExpertStack(matrices, biases, transposed))
        place = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # accelerate wraps what it spreads
        setattr(module, place, MethodType(layout.forward, module))


CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token")
"""Names that configurations have for k, the number of experts of a token."""


def experts_a_token(config: Any) -> int:
    """k, from the configuration of the model's text part; 1 if it says nothing."""
    found = next((getattr(config, name) for name in CHOSEN if getattr(config, name, None)), 1)
    return max(found) if isinstance(found, list | tuple) else int(found)
