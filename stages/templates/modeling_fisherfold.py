"""A language model whose linear layers are low-rank products, written by Fisherfold.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file needs torch and transformers, nothing else. It is the model's own architecture with some linear layers replaced, as
`config.fisherfold` lists them. Inside each are ordinary nn.Linear layers, which adapters and quantizers find by themselves
(for PEFT: `target_modules="all-linear"`).

Shapes: a layer has n outputs, m inputs and rank r.
"""

import threading

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig as DenseConfig
from transformers import LlamaForCausalLM as DenseForCausalLM


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

    y = cat(p, up(p))[order] with p = down(x). Output j is at place order[j].
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(m, rank, bias=False)
        self.up = nn.Linear(rank, n - rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None
        self.register_buffer("order", torch.arange(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pivots = self.down(x)
        rank = pivots.shape[-1]
        if permutes_weight(x, self.up, rank, self.order):
            return F.linear(pivots, under_identity(self.up.weight, rank)[self.order], self.bias)
        y = torch.cat((pivots, self.up(pivots)), dim=-1)
        y = y.gather(-1, self.order.expand(y.shape))
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
        rank = self.up.in_features
        if permutes_weight(x, self.down, rank, self.order):
            rows = under_identity(self.down.weight.t(), rank)
            return self.up(x @ torch.empty_like(rows).index_copy(0, self.order, rows))
        x = x.gather(-1, self.order.expand(x.shape))
        return self.up(x[..., :rank] + self.down(x[..., rank:]))


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
        x = x.gather(-1, self.order.expand(x.shape))
        return x[..., : self.rest.out_features] + self.rest(x[..., self.rest.out_features :])


class Memory(dict):
    """Right factors' products that some layer has yet to read, by thread. A copy starts empty."""

    def __reduce__(self):
        return Memory, ()


class SharedLowRankLinear(nn.Module):
    """y = up(z), z = down(x), where other layers that read the same x, `SharedMember`, make their outputs from the same z.

    z is computed once a pass: it is kept until each of the `readers` layers has had it, and only for the very tensor x that it
    was made of. r m numbers are stored once, r n for every layer.
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.down = self.right_factor(m, rank)
        self.up = nn.Linear(rank, n, bias=bias)
        self.readers = 1
        self.memory = Memory()

    def right_factor(self, m: int, rank: int) -> nn.Module:
        return nn.Linear(m, rank, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.read(x, reader=0))

    def read(self, x: torch.Tensor, reader: int) -> torch.Tensor:
        """down(x) for one of the layers, computed anew unless it waits for this very layer, tensor and gradient mode."""
        compiling = torch.compiler.is_compiling()
        thread = 0 if compiling else threading.get_ident()
        state = torch.is_grad_enabled(), 0 if compiling or x.is_inference() else x._version
        source, made, z, waiting = self.memory.get(thread, (None, None, None, ()))
        if source is not x or made != state or reader not in waiting:
            z, waiting = self.down(x), tuple(range(self.readers))
        waiting = tuple(other for other in waiting if other != reader)
        if waiting:
            self.memory[thread] = x, state, z, waiting
        else:
            self.memory.pop(thread, None)
        return z


class SharedPivotedInputLinear(SharedLowRankLinear):
    """The same with the pivoted right factor: r (m - r) numbers and an order are stored once, r n for every layer."""

    def right_factor(self, m: int, rank: int) -> nn.Module:
        return FoldedInputs(m, rank)


class SharedMember(nn.Module):
    """y = up(z), z from the layer `source`, which reads the same x: r n numbers."""

    def __init__(self, n: int, m: int, rank: int, bias: bool, source: str) -> None:
        super().__init__()
        self.up = nn.Linear(rank, n, bias=bias)
        self.source = source

    def join(self, model: nn.Module) -> None:
        """Find `source` in the model. It is held in a tuple, so that its weights are not registered here once more."""
        self.site = (model.get_submodule(self.source),)
        self.reader = self.site[0].readers
        self.site[0].readers += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.site[0].read(x, self.reader))


KINDS = {
    "factors": LowRankLinear,
    "pivoted_outputs": PivotedOutputLinear,
    "pivoted_inputs": PivotedInputLinear,
    "zero": ZeroLinear,
    "shared_factors": SharedLowRankLinear,
    "shared_pivoted_inputs": SharedPivotedInputLinear,
    "shared_member": SharedMember,
}
MANY_TOKENS = 128
PRODUCTS_PER_MOVE = {
    torch.float32: 85
}  # multiplications that a CPU does while it moves one number of a token, as measured
PRODUCTS_PER_MOVE_IN_HALF_PRECISION = 400


def permutes_weight(x: torch.Tensor, linear: nn.Linear, rank: int, order: torch.Tensor) -> bool:
    """Whether to permute the rows of a whole factor once, and not every token: on a CPU, for many tokens and a small rank.

    That costs r² more multiplications a token. A linear layer that an adapter, a quantizer or an offloading hook has taken
    over is always called as it is.
    """
    if x.device.type != "cpu" or x.numel() < MANY_TOKENS * x.shape[-1]:
        return False
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or hasattr(linear, "_hf_hook"):
        return False
    return rank**2 < len(order) * PRODUCTS_PER_MOVE.get(x.dtype, PRODUCTS_PER_MOVE_IN_HALF_PRECISION)


def under_identity(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The identity [r, r] and `rows` below it: a pivoted factor in full."""
    return torch.cat((torch.eye(rank, dtype=rows.dtype, device=rows.device), rows))


def replace(dense: nn.Module, kind: str, rank: int, **more) -> nn.Module:
    """The low-rank layer in place of a dense nn.Linear (weight [n, m]) or Conv1D (weight [m, n])."""
    n, m = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
    return KINDS[kind](n, m, rank, bias=dense.bias is not None, **more)


def replace_layers(model: nn.Module, layers: dict[str, dict]) -> None:
    """Put the low-rank layers into a dense model, by module name."""
    for name, layer in layers.items():
        model.set_submodule(name, replace(model.get_submodule(name), **layer))
    for name, layer in layers.items():
        if layer["kind"] == "shared_member":
            model.get_submodule(name).join(model)
    for name in sorted(layers)[:1]:
        # An empty tensor in the place of a dense weight: the dense model's class finds the wrong shape there and stops,
        # where it would otherwise fill the layers that it misses with random numbers.
        model.get_submodule(name).register_buffer("weight", torch.empty(0))


class FisherfoldConfig(DenseConfig):
    """The dense model's configuration, and `fisherfold`: {"layers": {module name: {"kind": …, "rank": …}}}.

    A layer of kind "shared_member" also has "source", the name of the layer that holds the right factor it shares.
    """

    model_type = f"fisherfold_{DenseConfig.model_type}"
    base_model_tp_plan = None  # the plans name layers that are no longer there
    fisherfold: dict | None = None


class FisherfoldForCausalLM(DenseForCausalLM):
    """The dense model with the layers of `config.fisherfold` replaced."""

    config_class = FisherfoldConfig

    def __init__(self, config: FisherfoldConfig) -> None:
        super().__init__(config)
        replace_layers(self, (config.fisherfold or {}).get("layers", {}))

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise RuntimeError(f"The checkpoint lacks {len(missing)} tensors of the model, such as {missing[0]!r}.")
        return (model, info) if output_loading_info else model


FisherfoldConfig.register_for_auto_class()
FisherfoldForCausalLM.register_for_auto_class("AutoModelForCausalLM")
