"""Units of work on paper: what one asks of a worker, and the operations of passes and products.

Shapes: S sequences of T tokens, N = S T; n outputs, m inputs, k sketch rank; V vocabulary, h hidden width.
"""

from dataclasses import dataclass, fields

from fisherfold.linalg.gram import NARROWEST, STRIPES
from fisherfold.network.layers import LinearLayer
from flows.planning.shapes import ModelShapes


@dataclass(frozen=True)
class Demand:
    """What one unit asks for.

    Attributes:
        model: operations of forward and backward passes, in the model's dtype.
        products: of matrix products in float32, of values in the model's dtype.
        eigen, svd: of decompositions in float64.
        host: of float64 work in NumPy and SciPy, on a processor even where there is a GPU.
        traffic: bytes through a device's memory beyond those products.
        read, written: bytes from and to the store.
    """

    model: float = 0.0
    products: float = 0.0
    eigen: float = 0.0
    svd: float = 0.0
    host: float = 0.0
    traffic: float = 0.0
    read: float = 0.0
    written: float = 0.0

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __mul__(self, factor: float) -> "Demand":
        return Demand(*(getattr(self, one.name) * factor for one in fields(self)))


@dataclass(frozen=True)
class StageCost:
    """One stage on paper.

    Attributes:
        units: what each asks for, and which it waits for, in the stage's order.
        serial: what the head does alone, before and after.
        peak: bytes that the stage holds on the disk at most.
        published: bytes of its output.
        memory: bytes that a unit holds on its device.
        loads: bytes that every worker reads before its first unit: the models.
        dtype: what the models compute in.
    """

    units: dict[str, tuple[Demand, tuple[str, ...]]]
    serial: Demand = Demand()
    peak: float = 0.0
    published: float = 0.0
    memory: float = 0.0
    loads: float = 0.0
    dtype: str = "float32"
    seconds: float = 0.0


def forward_operations(shapes: ModelShapes, tokens: int, length: int, logits: bool = True) -> float:
    """2 N (Σ n m + V h) for the products and 4 N T a for scores and values of every block, a heads' width together.

    Of experts, n m counts for the tokens that come to them.
    """
    head = shapes.vocabulary * shapes.hidden if logits else 0
    products = sum(shapes.seen(layer) * layer.dense_numbers for layer in shapes.layers)
    return 2.0 * tokens * (products + head) + 4.0 * tokens * length * shapes.attention_width * shapes.blocks


def pass_operations(shapes: ModelShapes, tokens: int, length: int, draws: int = 1) -> float:
    """A forward pass and backward passes for activations alone, which repeat its products (attention: twice)."""
    attention = 4.0 * tokens * length * shapes.attention_width * shapes.blocks
    return (1 + draws) * forward_operations(shapes, tokens, length) + draws * attention


def gram_operations(tokens: float, size: int) -> float:
    """Σ xᵀx in stripes of the upper block triangle: (1 + 1/stripes) N p²."""
    stripes = -(-size // max(NARROWEST, -(-size // STRIPES)))
    return tokens * size * size * (1 + 1 / stripes)


def sketch_operations(layer: LinearLayer, length: int, rank: int, needs_gradient: bool) -> float:
    """Of one sequence: three products with G (or with D and X), and two bases [p, k] from k x k Cholesky factors."""
    n, m = layer.outputs, layer.inputs
    product = 2.0 * n * m if needs_gradient else 2.0 * length * (n + m)
    return 3 * rank * product + 4.0 * (n + m) * rank**2
