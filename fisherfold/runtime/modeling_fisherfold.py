"""A language model whose linear layers are low-rank products, written by Fisherfold.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file needs torch and transformers, nothing else. It is the model's own architecture with some linear layers replaced, as `config.fisherfold`
lists them. Inside each are ordinary nn.Linear layers, which adapters and quantizers find by themselves (PEFT: `target_modules="all-linear"`).
Shapes: a layer has n outputs, m inputs and rank r.
"""

import sys
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
        self.down: nn.Module = nn.Linear(m, rank, bias=False)
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
        self.order: torch.Tensor
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
        self.rank = rank
        self.down = nn.Linear(m - rank, rank, bias=False)
        self.up = nn.Linear(rank, n, bias=bias)
        self.order: torch.Tensor
        self.register_buffer("order", torch.arange(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(fold(x, self.down, self.order, self.rank))


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
        self.rank = rank
        self.rest = nn.Linear(m - rank, rank, bias=False)
        self.order: torch.Tensor
        self.register_buffer("order", torch.arange(m))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x, self.rest, self.order, self.rank)


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
        self.site: tuple[Any] = (model.get_submodule(self.source),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.site[0].down(x))


KINDS: dict[str, type[nn.Module]] = {
    "factors": LowRankLinear,
    "pivoted_outputs": PivotedOutputLinear,
    "pivoted_inputs": PivotedInputLinear,
    "zero": ZeroLinear,
    "shared_factors": LowRankLinear,
    "shared_pivoted_inputs": SharedPivotedInputLinear,
    "shared_member": SharedMember,
}


def permute(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order]."""
    return x.gather(-1, order.expand(x.shape))


def fold(x: torch.Tensor, rest: nn.Module, order: torch.Tensor, rank: int) -> torch.Tensor:
    """p + rest(q), p and q the first r and the other inputs of x[order]."""
    x = permute(x, order)
    return x[..., :rank] + rest(x[..., rank:])


def replace_layers(
    model: nn.Module, layers: dict[str, dict[str, Any]], kinds: dict[str, type[nn.Module]] = KINDS
) -> None:
    """Put the low-rank layers into a dense model in the place of nn.Linear (weight [n, m]) or Conv1D (weight [m, n])."""
    find: Any = model.get_submodule
    for name, layer in layers.items():
        dense, kind = find(name), kinds[layer["kind"]]
        n, m = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
        more = {key: value for key, value in layer.items() if key != "kind"}
        model.set_submodule(name, kind(n, m, bias=dense.bias is not None, **more))
        # Some classes set a layer's weight when they initialize the module around it. They find one that is set already.
        find(name).weight = torch.empty(0, dense.weight.shape[1])
        find(name).weight._is_hf_initialized = True
    for name, layer in layers.items():
        if "source" in layer:
            find(name).join(model)
    for name in sorted(layers)[:1]:
        # An empty tensor in the place of a dense weight: the dense model's class finds the wrong shape there and stops,
        # where it would otherwise fill the layers that it misses with random numbers.
        weight = find(name).weight
        del find(name).weight
        find(name).register_buffer("weight", torch.empty_like(weight))


NOT_DENSE = {"quant_method": "fisherfold"}  # tells programs that know the dense model alone that this is another


class FisherfoldConfig(DenseConfig):
    """The dense model's configuration, and `fisherfold`: {"layers": {module name: {"kind": …, "rank": …}}}.

    A layer of kind "shared_member" also has "source", the name of the layer that holds the right factor it shares.
    A mixture has "experts", too, see modeling_fisherfold_experts.py beside this file. "tensor_parallel" is how the factors are split over devices, null where they cannot be.
    """

    fisherfold: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        plan = sorted(((self.fisherfold or {}).get("tensor_parallel") or {}).items(), reverse=True)  # halves come first
        self.base_model_tp_plan = dict(plan) or None  # type: ignore[misc, assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "quantization_config" or value != NOT_DENSE:  # engines set it again, from the file
            super().__setattr__(name, value)

    def to_diff_dict(self) -> dict[str, Any]:
        return {"quantization_config": dict(NOT_DENSE)} | super().to_diff_dict()  # another if numbers have few bits


def own_names(model: PreTrainedModel, part: str) -> dict[str, dict[str, Any]]:
    """A part of `config.fisherfold` by the names of modules in this model, which may be the base model alone."""
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    own: dict[str, dict[str, Any]] = (model.config.fisherfold or {}).get(part, {})
    own = {name.removeprefix(prefix): dict(entry) for name, entry in own.items()}
    for entry in own.values():
        entry.update({"source": entry["source"].removeprefix(prefix)} if "source" in entry else {})
    return own


class LowRank(PreTrainedModel):
    """The dense model, whole or base, with layers replaced."""

    config_class = FisherfoldConfig

    def __init__(self, config: FisherfoldConfig) -> None:
        super().__init__(config)
        vllm = None if config.base_model_tp_plan else sys.modules.get("vllm.distributed.parallel_state")
        if vllm and vllm.model_parallel_is_initialized() and vllm.get_tensor_model_parallel_world_size() > 1:
            raise ValueError("Pivoted or dropped layers cannot be split over devices. Set ranks.storage: factors.")
        replace_layers(self, own_names(self, "layers"))

    def _expand_parallel_plan(self, plan: dict[str, str]) -> Any:  # of low-rank layers the halves alone are split
        own, found = own_names(self, "layers"), super()._expand_parallel_plan(plan)
        return {name: style for name, style in found.items() if name not in own}

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # all parts but the layers are transformers' own, and are initialized as such

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
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
        return DenseForCausalLM._supports_default_dynamic_cache()  # type: ignore[misc]  # told from the class's name


FisherfoldConfig.register_for_auto_class()
FisherfoldModel.register_for_auto_class("AutoModel")
FisherfoldForCausalLM.register_for_auto_class("AutoModelForCausalLM")
