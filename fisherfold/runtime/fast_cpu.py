"""The checkpoint's layers for inference on a CPU: the same results as the plain layers of `modeling_fisherfold`, sooner.

`import fisherfold.runtime` puts these classes in the place of the plain ones. They hold no weights but the layer's own and keep nothing
from one pass to the next, so no layer can answer from weights or an order that have changed since. What they do
(`python benchmarks/throughput.py` has columns for both):

- a pivoted layer multiplies a single token as a vector and gathers along its first dimension, for which a CPU needs less time to get ready;
- numbers of half precision move as integers of their width, which takes half the time;
- layers that share a right factor compute its product once a pass of the module that they are in.

Wherever gradients are recorded, a graph is traced, or something has taken over an inner layer (an adapter, a quantizer, a hook), the
plain layer runs.
"""

import threading
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from torch.jit import is_tracing  # type: ignore[attr-defined]  # not in its __all__

from fisherfold.runtime import modeling_fisherfold as plain


class FastPivotedOutputLinear(plain.PivotedOutputLinear):
    """y = cat(z, up(z))[order]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.down(x)
        if not is_bare(z, self.up):
            return self.outputs(z)
        y = self.of_token(z) if is_token(z) else permute_bits(torch.cat((z, self.up(z)), dim=-1), self.order)
        return y if self.bias is None else y + self.bias

    def of_token(self, z: torch.Tensor) -> torch.Tensor:
        """The outputs for one token, without bias."""
        vector = z.reshape(-1)
        y = torch.cat((vector, torch.mv(self.up.weight, vector)))
        return y.index_select(0, self.order).view(*z.shape[:-1], -1)


class FastPivotedInputLinear(plain.PivotedInputLinear):
    """y = up(p + down(q))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(fold(x, self.down, self.order, self.rank))


class FastFoldedInputs(plain.FoldedInputs):
    """z = p + rest(q)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x, self.rest, self.order, self.rank)


class OncePerPass(plain.LowRankLinear):
    """A layer whose right factor others read: z = down(x) is computed once while the module around them all runs.

    It is kept from the start of that module's forward pass to its end, in the thread that runs it, and given out only for the very
    tensor x that it was made of, unchanged, in the same gradient mode.
    """

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__(n, m, rank, bias)
        self.passes = Passes()

    def watch(self, around: nn.Module) -> None:
        """Begin and end passes with those of the module `around`."""
        around.register_forward_pre_hook(self.begin)
        around.register_forward_hook(self.end, always_call=True)

    def begin(self, *_: object) -> None:
        """Hook: a pass of this thread begins."""
        if not is_traced():
            self.passes[threading.get_ident()] = None

    def end(self, *_: object) -> None:
        """Hook: it has ended."""
        if not is_traced():
            self.passes.pop(threading.get_ident(), None)

    def right(self, x: torch.Tensor) -> torch.Tensor:
        """down(x)."""
        if is_traced() or x.is_inference() or threading.get_ident() not in self.passes:
            return self.down(x)
        thread, state = threading.get_ident(), (x._version, torch.is_grad_enabled())
        kept = self.passes[thread]
        if kept is None or kept[0] is not x or kept[1] != state:
            kept = self.passes[thread] = x, state, self.down(x)
        return kept[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.right(x))


class FastSharedPivotedInputLinear(OncePerPass):
    """The same with a pivoted right factor."""

    def __init__(self, n: int, m: int, rank: int, bias: bool) -> None:
        super().__init__(n, m, rank, bias)
        self.down = FastFoldedInputs(m, rank)


class FastSharedMember(plain.SharedMember):
    """y = up(z), z from its source."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.site[0].right(x))


class Passes(dict[int, tuple[torch.Tensor, tuple[int, bool], torch.Tensor] | None]):
    """By thread, what its pass has computed so far. A copy of the layer is in no pass."""

    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return Passes, ()


KINDS: dict[str, type[nn.Module]] = plain.KINDS | {
    "pivoted_outputs": FastPivotedOutputLinear,
    "pivoted_inputs": FastPivotedInputLinear,
    "shared_factors": OncePerPass,
    "shared_pivoted_inputs": FastSharedPivotedInputLinear,
    "shared_member": FastSharedMember,
}


def replace_layers(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """`plain.replace_layers` with the layers above."""
    plain.replace_layers(model, layers, KINDS)
    sites: dict[str, list[str]] = {}
    for name, layer in layers.items():
        if "source" in layer:
            sites.setdefault(layer["source"], [layer["source"]]).append(name)
    for source, names in sites.items():
        shared: Any = model.get_submodule(source)
        shared.watch(model.get_submodule(common_parent(names)))


def common_parent(names: list[str]) -> str:
    """The name of the innermost module that holds all of these."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(part for part, *_ in takewhile(lambda group: len(set(group)) == 1, parts))


def is_token(x: torch.Tensor) -> bool:
    """Whether x is one token of one sequence."""
    return x.numel() == x.shape[-1]


def is_traced() -> bool:
    """Whether torch compiles or traces what runs here."""
    return torch.compiler.is_compiling() or is_tracing()


def is_bare(x: torch.Tensor, linear: nn.Module) -> bool:
    """Whether this is inference on a CPU, and no adapter, quantizer or hook has taken over the inner layer."""
    if type(linear) is not nn.Linear or not x.is_cpu or torch.is_grad_enabled() or is_traced():
        return False
    own = vars(linear)  # much faster than attributes
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return False
    return type(x) is torch.Tensor and type(own["_parameters"]["weight"]) is nn.Parameter


def fold(x: torch.Tensor, rest: nn.Linear, order: torch.Tensor, rank: int) -> torch.Tensor:
    """p + rest(q), p and q the first r and the other inputs of x[order]."""
    if not is_bare(x, rest):
        return plain.fold(x, rest, order, rank)
    shape = *x.shape[:-1], rank
    if is_token(x):
        x = x.reshape(-1).index_select(0, order)
        return torch.addmv(x[:rank], rest.weight, x[rank:]).view(shape)
    x = permute_bits(x, order).flatten(0, -2)
    return torch.addmm(x[:, :rank], x[:, rank:], rest.weight.t()).view(shape)


def permute_bits(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x[..., order]; numbers of 16 bits move as integers."""
    if x.itemsize != torch.int16.itemsize:
        return plain.permute(x, order)
    return plain.permute(x.view(torch.int16), order).view(x.dtype)
