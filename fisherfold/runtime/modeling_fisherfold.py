"""A language model whose linear layers are low-rank products, written by Fisherfold.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file needs torch and transformers, nothing else. It is the model's own architecture with some linear layers replaced, as
`config.fisherfold` lists them. Inside each are ordinary nn.Linear layers, which adapters and quantizers find by themselves
(for PEFT: `target_modules="all-linear"`).

Shapes: a layer has n outputs, m inputs and rank r.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig as DenseConfig
from transformers import LlamaForCausalLM as DenseForCausalLM
from transformers import LlamaModel as DenseModel
from transformers import PreTrainedModel


class LowRankLinear(nn.Module):
    """y = up(down(x)): r (n + m) numbers."""

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(m, rank, bias=False)
        self.up = nn.Linear(rank, n, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class PivotedOutputLinear(nn.Module):
    """r outputs are computed from x, the other n - r from those: r (n + m - r) numbers and an order (PivGa, PIFA).

    y = cat(z, up(z))[order] with z = down(x). Output j is at place order[j].
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(m, rank, bias=False)
        self.up = nn.Linear(rank, n - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None
        self.register_buffer("order", torch.arange(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outputs(self.down(x))

    def outputs(self, z: torch.Tensor) -> torch.Tensor:
        y = permute(torch.cat((z, self.up(z)), dim=-1), self.order)
        return y if self.bias is None else y + self.bias


class PivotedInputLinear(nn.Module):
    """The other m - r inputs are folded into r of them: r (n + m - r) numbers and an order (PivGa, PIFA).

    y = up(p + down(q)) with p, q the first r and the other inputs of x[order].
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(m - rank, rank, bias=False)
        self.up = nn.Linear(rank, n, bias=bias)
        self.register_buffer("order", torch.arange(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(fold(x, self.down, self.order))


class ZeroLinear(nn.Module):
    """A layer of rank 0: nothing is left of it but its bias."""

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.outputs = n
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(*x.shape[:-1], self.outputs)
        return y if self.bias is None else y + self.bias


class FoldedInputs(nn.Module):
    """z = p + rest(q), p and q the first r and the other inputs of x[order]: a pivoted right factor by itself."""

    def __init__(self, m: int, rank: int) -> None:
        super().__init__()
        self.rest = nn.Linear(m - rank, rank, bias=False)
        self.register_buffer("order", torch.arange(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x, self.rest, self.order)


class SharedPivotedInputLinear(LowRankLinear):
    """y = up(down(x)) with a pivoted right factor, which other layers use, too: r (m - r) numbers and an order, and r n."""

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__(n, m, rank, bias)
        self.down = FoldedInputs(m, rank)


class SharedMember(nn.Module):
    """y = up(down(x)), `down` being that of the layer `source`, which reads the same x: r n numbers."""

    def __init__(self, n: int, m: int, rank: int, bias: bool, source: str) -> None:
        super().__init__()
        self.source = source
        self.up = nn.Linear(rank, n, bias=bias)

    def join(self, model: nn.Module) -> None:
        """Find `source` in the model. It is held in a tuple, so that its weights are not registered here once more."""
        self.site = (model.get_submodule(self.source),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.site[0].down(x))


KINDS = {
    "factors": LowRankLinear,
    "pivoted_outputs": PivotedOutputLinear,
    "pivoted_inputs": PivotedInputLinear,
    "zero": ZeroLinear,
    "shared_factors": LowRankLinear,
    "shared_pivoted_inputs": SharedPivotedInputLinear,
    "shared_member": SharedMember,
}


def grouped(x: torch.Tensor, weights: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """W_e x for the rows of x [S, m], the first sizes[0] of them by weights[0] [n, m], and so on."""
    parts = [nn.functional.linear(part, W) for part, W in zip(x.split(sizes), weights) if len(part)]
    return torch.cat(parts) if parts else x.new_zeros(0, weights.shape[1])


def permute_grouped(x: torch.Tensor, orders: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """x[row, order], the order of the row's expert."""
    return torch.cat([part.index_select(-1, order) for part, order in zip(x.split(sizes), orders) if len(part)])


EXPERT_FACTORS = {
    "dense": lambda n, m, r: {"weight": (n, m)},
    "zero": lambda n, m, r: {},
    "factors": lambda n, m, r: {"down": (r, m), "up": (n, r)},
    "pivoted_outputs": lambda n, m, r: {"down": (r, m), "up": (n - r, r), "order": (n,)},
    "pivoted_inputs": lambda n, m, r: {"down": (r, m - r), "up": (n, r), "order": (m,)},
}


class ExpertClass(nn.Module):
    """Experts of one kind and rank: factors [E, ., .] that rows sorted by expert go through in grouped products."""

    def __init__(self, experts: int, n: int, m: int, kind: str, rank: int) -> None:
        super().__init__()
        self.experts, self.outputs, self.rank, self.kind = experts, n, rank, kind
        for name, shape in EXPERT_FACTORS[kind](n, m, rank).items():
            if name == "order":
                self.register_buffer(name, torch.arange(*shape).repeat(experts, 1))
            else:
                self.register_parameter(name, nn.Parameter(torch.zeros(experts, *shape)))

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


class ExpertStack(nn.ModuleList):
    """The matrices of E experts in a few classes, each with one kind and one rank; `of` is the class of every expert."""

    def __init__(self, n: int, m: int, classes: list[dict[str, Any]], of: list[int]) -> None:
        super().__init__(ExpertClass(of.count(c), n, m, **each) for c, each in enumerate(classes))
        sorted_experts = sorted(range(len(of)), key=lambda expert: (of[expert], expert))
        self.places = [sorted_experts.index(expert) for expert in range(len(of))]

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """y_t = W_e x_t for x [S, m], e = experts [S]."""
        places = torch.tensor(self.places, device=experts.device)[experts]
        return by_group(x, places, len(self.places), self.in_turn)

    def in_turn(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """The same for rows sorted by class and expert."""
        parts, first, row = [], 0, 0
        for each in self:
            own = sizes[first : first + each.experts]
            first, start, row = first + each.experts, row, row + sum(own)
            parts.append(each(x[start:row], own))
        return torch.cat(parts)


def by_group(x: torch.Tensor, groups: torch.Tensor, count: int, run: Any) -> torch.Tensor:
    """run(x, sizes) on the rows of x [S, m] sorted by their group [S], in their own order again."""
    order = groups.argsort(stable=True)
    sizes = torch.bincount(groups, minlength=count).tolist()
    return run(x[order], sizes)[order.argsort()]


class Experts:
    """Runs the experts of a dense model's module, some of whose stacks are `ExpertStack`s, others matrices [E, n, m] or [E, m, n]."""

    def project(self, name: str, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """y_t = W_e x_t + b_e for x [S, m], e = experts [S]."""
        stack, bias = getattr(self, f"{name}_classes", None), getattr(self, f"{name}_bias", None)
        if stack is not None:
            y = stack(x, experts)
        else:
            matrices = getattr(self, name)
            weights = matrices.mT if getattr(self, "is_transposed", True) else matrices
            y = by_group(x, experts, len(weights), lambda rows, sizes: grouped(rows, weights, sizes))
        return y if bias is None else y + bias[experts]


class RoutedExperts(Experts):
    """Experts that are given tokens and the choice of a router, as transformers' interface for experts has it."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        tokens, chosen = top_k_index.shape
        experts = top_k_index.reshape(-1)
        x = self.project(
            "gate_up_proj" if self.has_gate else "up_proj", hidden_states.repeat_interleave(chosen, 0), experts
        )
        x = self.project("down_proj", self._apply_gate(x) if self.has_gate else self.act_fn(x), experts)
        x = self.post_expert_norm(x) if self.has_post_expert_norm else x
        return (x * top_k_weights.reshape(-1, 1)).view(tokens, chosen, -1).sum(1).to(hidden_states.dtype)


class CopiedExperts(Experts):
    """Experts that are given a copy of all tokens each, zero where the router did not choose it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.any(-1).nonzero()[:, 0]
        experts = rows.div(len(hidden_states) // self.num_experts, rounding_mode="floor")
        gate, up = self.project("gate_up_proj", hidden_states[rows], experts).chunk(2, dim=-1)
        y = self.project("down_proj", up * self.act_fn(gate), experts)
        return torch.zeros_like(hidden_states).index_copy(0, rows, y)


LAYOUTS = {"interface": RoutedExperts, "copies": CopiedExperts}


def replace_experts(model: nn.Module, experts: dict[str, dict[str, Any]]) -> None:
    """Put low-rank stacks into a dense model's modules of experts: {module: {"layout": …, "stacks": {name: {"classes", "of"}}}}."""
    for name, found in experts.items():
        module, layout = model.get_submodule(name), LAYOUTS[found["layout"]]
        for stack, entry in found["stacks"].items():
            _, n, m = module._parameters.pop(stack).shape
            n, m = (m, n) if getattr(module, "is_transposed", True) else (n, m)
            module.add_module(f"{stack}_classes", ExpertStack(n, m, entry["classes"], entry["of"]))
        module.__class__ = type(f"LowRank{type(module).__name__}", (layout, type(module)), {})
        module._is_hf_initialized = True  # the dense model would draw its stacks
    for name in sorted(f"{name}.{stack}" for name, found in experts.items() for stack in found["stacks"])[:1]:
        owner, _, stack = name.rpartition(".")
        model.get_submodule(owner).register_buffer(stack, torch.empty(0))  # as in `replace_layers`


def permute(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order]."""
    return x.gather(-1, order.expand(x.shape))


def fold(x: torch.Tensor, rest: nn.Module, order: torch.Tensor) -> torch.Tensor:
    """p + rest(q), p and q the first r and the other inputs of x[order]."""
    x = permute(x, order)
    rank = len(order) - rest.in_features
    return x[..., :rank] + rest(x[..., rank:])


def replace_layers(
    model: nn.Module, layers: dict[str, dict[str, Any]], kinds: dict[str, type[nn.Module]] = KINDS
) -> None:
    """Put the low-rank layers into a dense model in the place of nn.Linear (weight [n, m]) or Conv1D (weight [m, n])."""
    for name, layer in layers.items():
        dense, kind = model.get_submodule(name), kinds[layer["kind"]]
        n, m = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
        more = {key: value for key, value in layer.items() if key != "kind"}
        model.set_submodule(name, kind(n, m, bias=dense.bias is not None, **more))
        # Some classes set a layer's weight when they initialize the module around it. They find one that is set already.
        model.get_submodule(name).weight = torch.empty(0, dense.weight.shape[1])
        model.get_submodule(name).weight._is_hf_initialized = True
    for name, layer in layers.items():
        if "source" in layer:
            model.get_submodule(name).join(model)
    for name in sorted(layers)[:1]:
        # An empty tensor in the place of a dense weight: the dense model's class finds the wrong shape there and stops,
        # where it would otherwise fill the layers that it misses with random numbers.
        weight = model.get_submodule(name).weight
        del model.get_submodule(name).weight
        model.get_submodule(name).register_buffer("weight", torch.empty_like(weight))


class FisherfoldConfig(DenseConfig):
    """The dense model's configuration, and `fisherfold`: {"layers": {module name: {"kind": …, "rank": …}}}.

    A layer of kind "shared_member" also has "source", the name of the layer that holds the right factor it shares.
    "experts" are stacks of experts' matrices, see `replace_experts`. "tensor_parallel" is how the factors are split over devices, null where they cannot be.
    """

    fisherfold: dict[str, Any] | None = None

    def __post_init__(self, **kwargs) -> None:
        kwargs.pop("quantization_config", None)  # tells programs that know the dense model alone that this is another
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = (self.fisherfold or {}).get("tensor_parallel")

    def to_diff_dict(self) -> dict[str, Any]:
        return super().to_diff_dict() | {"quantization_config": {"quant_method": "fisherfold"}}


def low_rank_layers(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The layers of `config.fisherfold` by their names in this model, which may be the base model alone."""
    layers = (model.config.fisherfold or {}).get("layers", {})
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    own = {name.removeprefix(prefix): dict(layer) for name, layer in layers.items()}
    for layer in own.values():
        layer.update({"source": layer["source"].removeprefix(prefix)} if "source" in layer else {})
    return own


def low_rank_experts(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """The modules of experts of `config.fisherfold` by their names in this model, which may be the base model alone."""
    experts = (model.config.fisherfold or {}).get("experts", {})
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    return {name.removeprefix(prefix): found for name, found in experts.items()}


class LowRank:
    """The dense model, whole or base, with layers replaced."""

    config_class = FisherfoldConfig

    def __init__(self, config: FisherfoldConfig) -> None:
        super().__init__(config)
        replace_layers(self, low_rank_layers(self))
        replace_experts(self, low_rank_experts(self))

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # all parts but the layers are transformers' own, and are initialized as such

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise RuntimeError(f"The checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]!r}.")
        return (model, info) if output_loading_info else model


class FisherfoldModel(LowRank, DenseModel):
    """The model without its head."""


class FisherfoldForCausalLM(LowRank, DenseForCausalLM):
    """The model."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return DenseForCausalLM._supports_default_dynamic_cache()  # transformers tells it from the name of the class


FisherfoldConfig.register_for_auto_class()
FisherfoldModel.register_for_auto_class("AutoModel")
FisherfoldForCausalLM.register_for_auto_class("AutoModelForCausalLM")
