"""The linear layers of a causal language model, found from the model itself."""

from dataclasses import dataclass


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
    """

    name: str
    outputs: int
    inputs: int
    bias: bool
    transposed: bool
    group: str
