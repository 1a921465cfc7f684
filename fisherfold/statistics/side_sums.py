"""The sums of one side of a linear layer: of what it reads (shared by a group of layers), and of the gradients of what it gives.

Shapes: B sequences of T tokens in a batch, x [m] input and d [n] output gradient of a layer at one token,
X [T, m] and D [T, n] those of one sequence, G = D^T X [n, m] the sequence's gradient.
"""

from collections import defaultdict

import torch

from fisherfold.linalg.gram import add_tokens, exact_products
from fisherfold.linalg.sketch import GradientBatch
from fisherfold.network.layers import LinearLayer
from fisherfold.statistics.gradient_forms import Arrays, GradientForm, Shapes

ROWS_IN_CACHE = 256


class InputSums:
    """Sums of x x^T and |x| over the tokens that a group of layers reads.

    If several layers read them, also the sum of g g^T, where g = sum_c W_c^T d_c is what these send back; that of a single
    layer is W^T (sum of d d^T) W.
    """

    def __init__(self, inputs: int, device: torch.device, shared: bool) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.absolute = torch.zeros(inputs, device=device)
        self.gradient_gram = torch.zeros(inputs, inputs, device=device) if shared else None

    def add(self, x: torch.Tensor) -> None:
        """Add the tokens of x [..., m]."""
        add_tokens(self.gram, x)
        rows = x.flatten(0, -2)
        for some in rows.split(len(rows) if rows.is_cuda else ROWS_IN_CACHE):
            self.absolute += some.abs().sum(0, dtype=self.absolute.dtype)

    def add_gradient(self, g: torch.Tensor) -> None:
        """Add the tokens of g [..., m]; they are of a shared group."""
        assert self.gradient_gram is not None
        add_tokens(self.gradient_gram, g)

    def grams(self) -> list[torch.Tensor]:
        """Those that are there."""
        return [self.gram] if self.gradient_gram is None else [self.gram, self.gradient_gram]

    def arrays(self) -> Arrays:
        """The sums themselves, of symmetric ones the upper triangle."""
        return {"input_abs": self.absolute, **dict(zip(("input_gram", "gradient_gram"), self.grams()))}


class OutputSums:
    """Sum of d d^T over the tokens of one layer and, if gradients are kept, sums over its sequences of G and G*G.

    Of an expert also how many tokens were routed to it.
    """

    def __init__(self, layer: LinearLayer, device: torch.device, form: GradientForm | None, shapes: Shapes) -> None:
        self.form = form
        self.shapes = {**shapes, "norm": ()}
        self.tokens = 0
        self.gram = torch.zeros(layer.outputs, layer.outputs, device=device)
        self.routed = torch.zeros(1, device=device) if layer.stack else None
        self.kept: dict[str, list[torch.Tensor]] = defaultdict(list)
        if form is not None:
            self.gradient = torch.zeros(layer.outputs, layer.inputs, device=device)
            self.squares_by_input = torch.zeros(layer.inputs, device=device)
            self.squares_by_output = torch.zeros(layer.outputs, device=device)

    def add(self, d: torch.Tensor, seen_before: bool = False) -> None:
        """Add the tokens of d [..., n]; of those that were seen before, under other labels, none is counted again."""
        tokens = 0 if seen_before else d.shape[:-1].numel()
        self.tokens += tokens
        if self.routed is not None:
            self.routed += tokens
        add_tokens(self.gram, d)

    def add_gradients(self, D: torch.Tensor, X: torch.Tensor) -> None:
        """Add the gradients of a batch, from D [B, T, n] and X [B, T, m]."""
        assert self.form is not None
        exact = exact_products(X)  # a linear layer's output, and so its gradient, has its input's dtype
        D, X = D.to(self.gram), X.to(self.gram)
        needed = self.form.needs_gradients(D.shape[1])
        G = D.new_empty(len(D) if needed else 1, *self.gradient.shape)
        norms = D.new_empty(len(D))
        squares = torch.empty_like(self.gradient)
        for s in range(len(D)):
            one = G[s if needed else 0]
            with exact:
                torch.mm(D[s].T, X[s], out=one)
            norms[s] = self._add_gradient(one, squares)
        arrays = self.form.arrays(GradientBatch(D, X, G if needed else None, norms, coarse=exact))
        for name, values in {**arrays, "norm": norms}.items():
            self.kept[name].append(values)

    def keep_zeros(self, sequences: int) -> None:
        """Keep gradients of zero for sequences none of whose tokens came to the layer, an expert say."""
        for name, shape in self.shapes.items():
            self.kept[name].append(self.gram.new_zeros(sequences, *shape))

    def _add_gradient(self, G: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """Add one sequence's gradient [n, m]; its norm squared. `squares` [n, m] is overwritten."""
        torch.mul(G, G, out=squares)
        by_output = squares.sum(1)
        self.gradient += G
        self.squares_by_input += squares.sum(0)
        self.squares_by_output += by_output
        return by_output.sum()

    def grams(self) -> list[torch.Tensor]:
        return [self.gram]

    def arrays(self) -> Arrays:
        arrays = {"output_gram": self.gram}
        if self.routed is not None:
            arrays["routed"] = self.routed
        if self.form is not None:
            arrays["gradient_sum"] = self.gradient
            arrays["fisher_inputs"] = self.squares_by_input
            arrays["fisher_outputs"] = self.squares_by_output
        return arrays
