"""A mixture of experts whose experts are low-rank products, written by Fisherfold: what such a model has beyond modeling_fisherfold.py.

The matrices of a layer's experts lie in classes of one kind and one rank each. Rows are sorted by expert once a layer, go through the factors of
their class in grouped products, and return to their places.

Shapes: a layer has E experts of n outputs and m inputs, S rows reach it.
"""

from typing import Any

import torch
from torch import nn

from .modeling_fisherfold import FisherfoldConfig, FisherfoldForCausalLM, FisherfoldModel, own_names


def grouped(x: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """W_e x for the rows of x [S, m], the first sizes[0] of them by weights[0] [n, m], and so on."""
    return each_part(x, sizes, lambda part, e: nn.functional.linear(part, weights[e]))


def permute_grouped(x: torch.Tensor, orders: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """x[row, order], the order of the row's expert."""
    return each_part(x, sizes, lambda part, e: part.index_select(-1, orders[e]))


def each_part(x: torch.Tensor, sizes: list[int], run: Any) -> torch.Tensor:
    """run(part, e) of the rows of each expert e that has any, one below the other."""
    parts = [run(part, e) for e, part in enumerate(x.split(sizes)) if sizes[e]]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


EXPERT_FACTORS = {
    "dense": lambda n, m, r: {"weight": (n, m)},
    "zero": lambda n, m, r: {},
    "factors": lambda n, m, r: {"down": (r, m), "up": (n, r)},
    "pivoted_outputs": lambda n, m, r: {"down": (r, m), "up": (n - r, r), "order": (n,)},
    "pivoted_inputs": lambda n, m, r: {"down": (r, m - r), "up": (n, r), "order": (m,)},
    "shared_factors": lambda n, m, r: {"down": (r, m), "up": (n, r)},
    "shared_pivoted_inputs": lambda n, m, r: {"down": (r, m - r), "up": (n, r), "order": (m,)},
}
SHARED = {"shared_factors": ("down",), "shared_pivoted_inputs": ("down", "order")}
"""What a class has once for all its experts, by kind."""


class ExpertClass(nn.Module):
    """Experts of one kind and rank: factors [E, ., .] that rows sorted by expert go through in grouped products."""

    weight: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    order: torch.Tensor

    def __init__(self, experts: int, n: int, m: int, kind: str, rank: int) -> None:
        super().__init__()
        self.experts, self.outputs, self.rank, self.kind = experts, n, rank, kind
        for name, shape in EXPERT_FACTORS[kind](n, m, rank).items():
            each = () if name in SHARED.get(kind, ()) else (experts,)
            if name == "order":
                self.register_buffer(name, torch.arange(*shape).expand(*each, *shape).clone())
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(*each, *shape)))

    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """x [S, m], of which each expert has so many rows, in turn."""
        return getattr(self, f"run_{self.kind}")(x, sizes) if len(x) else x.new_zeros(0, self.outputs)

    def run_dense(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return grouped(x, self.weight, sizes)

    def run_zero(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return x.new_zeros(len(x), self.outputs)

    def run_factors(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return grouped(grouped(x, self.down, sizes), self.up, sizes)

    def run_pivoted_outputs(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        z = grouped(x, self.down, sizes)
        return permute_grouped(torch.cat((z, grouped(z, self.up, sizes)), dim=-1), self.order, sizes)

    def run_pivoted_inputs(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        x = permute_grouped(x, self.order, sizes)
        return grouped(x[:, : self.rank] + grouped(x[:, self.rank :], self.down, sizes), self.up, sizes)

    def run_shared_factors(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return grouped(nn.functional.linear(x, self.down), self.up, sizes)

    def run_shared_pivoted_inputs(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        x = x.index_select(-1, self.order)
        return grouped(x[:, : self.rank] + nn.functional.linear(x[:, self.rank :], self.down), self.up, sizes)


class ExpertStack(nn.ModuleList):
    """The matrices of E experts in a few classes, each with one kind and one rank; `of` is the class of every expert."""

    def __init__(self, n: int, m: int, classes: list[dict[str, Any]], of: list[int]) -> None:
        super().__init__(ExpertClass(of.count(c), n, m, **each) for c, each in enumerate(classes))
        self.members = [[expert for expert, own in enumerate(of) if own == c] for c in range(len(classes))]

    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """W_e x for the rows of x [S, m], of which each expert has so many, in turn."""
        classes: list[Any] = list(self)
        if len(classes) == 1:
            y: torch.Tensor = classes[0](x, sizes)
            return y
        parts, found = x.split(sizes), list(x.split(sizes))
        for each, members in zip(classes, self.members):
            own = [sizes[expert] for expert in members]
            y = each(torch.cat([parts[expert] for expert in members]), own)
            for expert, part in zip(members, y.split(own)):
                found[expert] = part
        return torch.cat(found)


class Experts:
    """Runs the experts of a dense model's module, some of whose stacks are `ExpertStack`s, others matrices [E, n, m] or [E, m, n]."""

    def project(self: Any, name: str, x: torch.Tensor, experts: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """y_t = W_e x_t + b_e for x [S, m], whose rows are sorted by their experts e [S]; each expert has so many."""
        stack, bias = getattr(self, f"{name}_classes", None), getattr(self, f"{name}_bias", None)
        if stack is not None:
            y = stack(x, sizes)
        else:
            matrices = getattr(self, name)
            y = grouped(x, matrices.mT if getattr(self, "is_transposed", True) else matrices, sizes)
        return y if bias is None else y + bias[experts]

    def rows_of_each(self: Any, experts: torch.Tensor) -> list[int]:
        """How many rows each expert has."""
        return torch.bincount(experts, minlength=self.expert_count).tolist()


class RoutedExperts(Experts):
    """Experts that are given tokens and the choice of a router, as transformers' interface for experts has it."""

    def forward(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, chosen = top_k_index.shape
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        sizes = self.rows_of_each(experts)
        x = hidden_states[order.div(chosen, rounding_mode="floor")]
        x = self.project("gate_up_proj" if self.has_gate else "up_proj", x, experts, sizes)
        x = self.project("down_proj", self._apply_gate(x) if self.has_gate else self.act_fn(x), experts, sizes)
        x = self.post_expert_norm(x) if self.has_post_expert_norm else x
        x = (x * top_k_weights.reshape(-1, 1)[order])[order.argsort()]
        return x.view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


class CopiedExperts(Experts):
    """Experts that are given a copy of all tokens each, zero where the router did not choose it."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.any(-1).nonzero()[:, 0]
        experts = rows.div(len(hidden_states) // self.expert_count, rounding_mode="floor")
        sizes = self.rows_of_each(experts)
        gate, up = self.project("gate_up_proj", hidden_states[rows], experts, sizes).chunk(2, dim=-1)
        y = self.project("down_proj", up * self.act_fn(gate), experts, sizes)
        return torch.zeros_like(hidden_states).index_copy(0, rows, y)


LAYOUTS = {"interface": RoutedExperts, "copies": CopiedExperts}


def replace_experts(model: nn.Module, experts: dict[str, dict[str, Any]]) -> None:
    """Put low-rank stacks into a dense model's modules of experts: {module: {"layout": …, "stacks": {name: {"classes", "of"}}}}."""
    for name, found in experts.items():
        module: Any = model.get_submodule(name)
        layout = LAYOUTS[found["layout"]]
        for stack, entry in found["stacks"].items():
            module.expert_count, n, m = module._parameters.pop(stack).shape
            n, m = (m, n) if getattr(module, "is_transposed", True) else (n, m)
            module.add_module(f"{stack}_classes", ExpertStack(n, m, entry["classes"], entry["of"]))
        module.__class__ = type(f"LowRank{type(module).__name__}", (layout, type(module)), {})
        module._is_hf_initialized = True  # the dense model would draw its stacks
    for name in sorted(f"{name}.{stack}" for name, found in experts.items() for stack in found["stacks"])[:1]:
        owner, _, stack = name.rpartition(".")
        model.get_submodule(owner).register_buffer(stack, torch.empty(0))  # as in `replace_layers`


class LowRankExperts:
    """A low-rank model with stacks of experts replaced, too."""

    def __init__(self, config: FisherfoldConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]  # of the class beside this one
        model: Any = self
        replace_experts(model, own_names(model, "experts"))


class FisherfoldMixtureModel(LowRankExperts, FisherfoldModel):
    """The model without its head."""


class FisherfoldMixtureForCausalLM(LowRankExperts, FisherfoldForCausalLM):
    """The model."""


FisherfoldMixtureModel.register_for_auto_class("AutoModel")
FisherfoldMixtureForCausalLM.register_for_auto_class("AutoModelForCausalLM")
