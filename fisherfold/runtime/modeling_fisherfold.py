"""A language model whose linear layers are low-rank products, written by Fisherfold.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file needs torch and transformers, nothing else. It is the model's own architecture with some linear layers replaced, as
`config.fisherfold` lists them. Inside each are ordinary nn.Linear layers, which adapters and quantizers find by themselves
(for PEFT: `target_modules="all-linear"`).

Shapes: a layer has n outputs, m inputs and rank r.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig as DenseConfig
from transformers import LlamaForCausalLM as DenseForCausalLM


class LowRankLinear(nn.Module):
    """y = up(down(x)): r (n + m) numbers.

    The right half of a layer makes z, r numbers, of x, and the left half makes y of z. Other kinds have another half.
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.make_right(m)
        self.make_left(n, bias)

    def make_right(self, m: int) -> None:
        self.down = nn.Linear(m, self.rank, bias=False)

    def make_left(self, n: int, bias: bool) -> None:
        self.up = nn.Linear(self.rank, n, bias=bias)

    def right(self, x: torch.Tensor) -> torch.Tensor:
        return multiply(self.down, x)

    def left(self, z: torch.Tensor) -> torch.Tensor:
        return multiply(self.up, z)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(self.right(x))


class PivotedOutputLinear(LowRankLinear):
    """r outputs are computed from x, the other n - r from those: r (n + m - r) numbers and an order (PivGa, PIFA).

    y = cat(z, up(z))[order] with z = down(x). Output j is at place order[j].
    """

    def make_left(self, n: int, bias: bool) -> None:
        self.up = nn.Linear(self.rank, n - self.rank, bias=False)
        self.bias = nn.Parameter(torch.zeros(n)) if bias else None
        self.register_buffer("order", torch.arange(n))
        self.memory = Memory()

    def left(self, z: torch.Tensor) -> torch.Tensor:
        up, order = self.up, self.order
        bare = is_bare(z, up)
        if bare and is_token(z):
            p = z.reshape(-1)
            y = torch.cat((p, of_token(up, p))).index_select(0, order).view(*z.shape[:-1], -1)
        elif bare and prefers_whole(z, self.rank, order):
            y = F.linear(z, self.memory.whole(up.weight, self.whole_factor))
        else:
            y = permute(torch.cat((z, up(z)), dim=-1), order)
        return y if self.bias is None else y + self.bias

    def whole_factor(self) -> torch.Tensor:
        """[n, r], the left factor in full."""
        return under_identity(self.up.weight)[self.order]


class PivotedInputLinear(LowRankLinear):
    """The other m - r inputs are folded into r of them: r (n + m - r) numbers and an order (PivGa, PIFA).

    y = up(p + down(q)) with p, q the first r and the other inputs of x[order].
    """

    def make_right(self, m: int) -> None:
        self.down = nn.Linear(m - self.rank, self.rank, bias=False)
        self.register_buffer("order", torch.arange(m))
        self.memory = Memory()

    def right(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x, self.down, self.order, self.memory)


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
        self.memory = Memory()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x, self.rest, self.order, self.memory)


class SharedLowRankLinear(LowRankLinear):
    """y = up(z), z = down(x), where other layers that read the same x, `SharedMember`, make their outputs from the same z.

    z is computed once a pass: it is kept until each of the `readers` layers has had it, and only for the very tensor x that it
    was made of. r m numbers are stored once, r n for every layer.
    """

    def make_right(self, m: int) -> None:
        self.down = self.right_factor(m)
        self.readers = 1
        self.waiting = Memory()

    def right_factor(self, m: int) -> nn.Module:
        return nn.Linear(m, self.rank, bias=False)

    def right(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x, reader=0)

    def read(self, x: torch.Tensor, reader: int) -> torch.Tensor:
        """down(x) for one of the layers, computed anew unless it waits for this very layer, tensor and gradient mode."""
        compiling = torch.compiler.is_compiling()
        thread = 0 if compiling else threading.get_ident()
        state = torch.is_grad_enabled(), 0 if compiling or x.is_inference() else x._version
        source, made, z, waiting = self.waiting.get(thread, (None, None, None, ()))
        if source is not x or made != state or reader not in waiting:
            z, waiting = multiply(self.down, x), tuple(range(self.readers))
        waiting = tuple(other for other in waiting if other != reader)
        if waiting:
            self.waiting[thread] = x, state, z, waiting
        else:
            self.waiting.pop(thread, None)
        return z


class SharedPivotedInputLinear(SharedLowRankLinear):
    """The same with the pivoted right factor: r (m - r) numbers and an order are stored once, r n for every layer."""

    def right_factor(self, m: int) -> nn.Module:
        return FoldedInputs(m, self.rank)


class SharedMember(LowRankLinear):
    """y = up(z), z from the layer `source`, which reads the same x: r n numbers."""

    def __init__(self, n: int, m: int, rank: int, bias: bool, source: str) -> None:
        super().__init__(n, m, rank, bias)
        self.source = source

    def make_right(self, m: int) -> None:
        """It is `source` that has one."""

    def join(self, model: nn.Module) -> None:
        """Find `source` in the model. It is held in a tuple, so that its weights are not registered here once more."""
        self.site = (model.get_submodule(self.source),)
        self.reader = self.site[0].readers
        self.site[0].readers += 1

    def right(self, x: torch.Tensor) -> torch.Tensor:
        return self.site[0].read(x, self.reader)


KINDS = {
    "factors": LowRankLinear,
    "pivoted_outputs": PivotedOutputLinear,
    "pivoted_inputs": PivotedInputLinear,
    "zero": ZeroLinear,
    "shared_factors": SharedLowRankLinear,
    "shared_pivoted_inputs": SharedPivotedInputLinear,
    "shared_member": SharedMember,
}
# How the layers compute. Every way has the same result; on a CPU, without gradients, some are faster than the plain one.

MANY_TOKENS = 128
PRODUCTS_PER_MOVE = {torch.float32: 60}
"""Multiplications that a CPU does while it moves one number of a token, as measured."""
PRODUCTS_PER_MOVE_IN_HALF_PRECISION = 1500
INTEGERS = {2: torch.int16, 4: torch.int32}


class Memory(dict[str, Any]):
    """What a layer keeps from one call to the next, besides its parameters. A copy starts empty."""

    def __reduce__(self):
        return Memory, ()

    def whole(self, weight: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """make(), a matrix made of `weight`; made anew when the weight changes.

        Its version tells, or, if it was written to without that, a sample of its numbers.
        """
        state = weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
        if self.get("state") != state or not torch.equal(self["sample"], self["seen"]):
            seen = weight.detach().view(-1)[:: 1 + weight.numel() // 16]
            self.update(state=state, seen=seen, sample=seen.clone(), whole=make())
        return self["whole"]


def is_token(x: torch.Tensor) -> bool:
    return x.numel() == x.shape[-1]


def is_bare(x: torch.Tensor, linear: nn.Module) -> bool:
    """Whether this is inference on a CPU, and no adapter, quantizer or hook has taken over the inner layer."""
    if type(linear) is not nn.Linear or not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    own = vars(linear)  # much faster than attributes
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    return type(x) is torch.Tensor and type(own["_parameters"]["weight"]) is nn.Parameter


def multiply(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(x)."""
    if is_token(x) and is_bare(x, linear):
        return of_token(linear, x.reshape(-1)).view(*x.shape[:-1], -1)
    return linear(x)


def of_token(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """linear(x) of a vector x, as a product with a vector, for which a CPU needs less time to get ready."""
    parameters = vars(linear)["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)


def fold(x: torch.Tensor, rest: nn.Linear, order: torch.Tensor, memory: Memory) -> torch.Tensor:
    """p + rest(q), p and q the first r and the other inputs of x[order]."""
    rank = len(order) - rest.in_features
    bare = is_bare(x, rest)
    if bare and is_token(x):
        x, shape = x.reshape(-1).index_select(0, order), x.shape[:-1]
        return torch.addmv(x[:rank], rest.weight, x[rank:]).view(*shape, -1)
    if bare and prefers_whole(x, rank, order):
        return F.linear(x, memory.whole(rest.weight, lambda: whole_fold(rest, order)))
    x = permute(x, order)
    p, q = x[..., :rank], x[..., rank:]
    if bare and x.dim() > 1:
        return torch.addmm(p.flatten(0, -2), q.flatten(0, -2), rest.weight.t()).view(p.shape)
    return p + rest(q)


def whole_fold(rest: nn.Linear, order: torch.Tensor) -> torch.Tensor:
    """[r, m], the right factor in full."""
    return under_identity(rest.weight.t())[order.argsort()].t().contiguous()


def permute(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order]. Without gradients numbers move as integers, which a CPU does twice as fast in 16 bits."""
    if not x.is_cpu or torch.is_grad_enabled() or x.itemsize not in INTEGERS or torch.compiler.is_compiling():
        return x.gather(-1, order.expand(x.shape))
    return x.view(INTEGERS[x.itemsize]).gather(-1, order.expand(x.shape)).view(x.dtype)


def prefers_whole(x: torch.Tensor, rank: int, order: torch.Tensor) -> bool:
    """Whether to multiply by a pivoted factor in full, the identity and the order in it, rather than to permute the tokens.

    That costs r² more multiplications a token, and memory for the factor, min(n, m) r numbers; on a CPU it pays for many tokens.
    """
    if x.numel() < MANY_TOKENS * x.shape[-1]:
        return False
    return rank**2 < len(order) * PRODUCTS_PER_MOVE.get(x.dtype, PRODUCTS_PER_MOVE_IN_HALF_PRECISION)


def under_identity(rows: torch.Tensor) -> torch.Tensor:
    """The identity [r, r] and `rows` [k - r, r] below it: a pivoted factor in full."""
    return torch.cat((torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device), rows))


def replace(dense: nn.Module, kind: str, rank: int, **more) -> nn.Module:
    """The low-rank layer in place of a dense nn.Linear (weight [n, m]) or Conv1D (weight [m, n])."""
    n, m = dense.weight.shape if isinstance(dense, nn.Linear) else dense.weight.shape[::-1]
    return KINDS[kind](n, m, rank, bias=dense.bias is not None, **more)


def replace_layers(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Put the low-rank layers into a dense model, by module name."""
    for name, layer in layers.items():
        model.set_submodule(name, replace(model.get_submodule(name), **layer))
    for name, layer in layers.items():
        if "source" in layer:
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
    fisherfold: dict[str, Any] | None = None


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
