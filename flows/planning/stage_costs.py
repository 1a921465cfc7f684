"""What the units of every stage ask of a worker, on paper: operations, bytes read and written, memory.

Operations count a multiplication and an addition as two. They are those of the very code in stages/, by its own shapes, stripes and
rules; where a count depends on the data (iterations, questions' length, ranks), the assumption is a constant here.

Shapes: S sequences of T tokens, N = S T; n outputs, m inputs, r = min(n, m), k sketch rank; V vocabulary, h hidden width.
"""

from collections.abc import Callable, Mapping, Sequence

from fisherfold.allocators.corrected import PARTS, SEQUENCES
from fisherfold.allocators.cost import PIVOTED_SIDES
from fisherfold.evaluation.knowledge import QUESTIONS_PER_UNIT
from fisherfold.evaluation.text import BATCHES_PER_SHARD
from fisherfold.export.refinement import passes_over
from fisherfold.export.training_text import text_sizes
from fisherfold.network.labels import count_draws
from fisherfold.network.layers import LinearLayer, by_group
from fisherfold.network.models import DTYPES
from fisherfold.network.sites import bundles
from fisherfold.run.determinism import STREAMED
from fisherfold.run.params import Params
from fisherfold.run.registry import Registry
from fisherfold.run.unit_work import share
from fisherfold.statistics.dependence import MOST_TOKENS
from fisherfold.statistics.gradient_forms import Shapes
from flows.planning.answers import greedy_answers, own_text_units
from flows.planning.capture_costs import CAPTURE_COSTS, activation_bytes
from flows.planning.demand import Demand, StageCost, forward_operations
from flows.planning.group_shapes import basis_shapes, gathered_bytes, joined_bytes
from flows.planning.shapes import ModelShapes

POWER_STEPS = 10  # of the nearest Kronecker pair; six for most layers of the demo
PASSES_PER_DRAW = 14  # over tokens × tokens float64 numbers: a permutation of two kernels, a product with each, a mean
QUESTION_TOKENS = 48  # of a question with all its choices, the context read once
DECOMPOSITION = {
    "eigen": 9.0,
    "cholesky": 1.0,
    "svd": 21.0,
}  # operations / p³ for eigenvectors, and at their pace for a Cholesky root with its condition; / (larger · smaller²) for singular vectors
CONVERSION = 1500  # operations a parameter: dequantising, checking, casting
LOGIT_BYTES = 12  # held a logit: two models' in float32, and their product
LOGIT_TRAFFIC = 40  # bytes a logit: probabilities of two models in float32, their losses and divergence


STAGE_COSTS: Registry[Callable[[ModelShapes, Params, int], StageCost]] = Registry("stage")
"""By stage: (shapes, params, workers) -> its cost."""


@STAGE_COSTS.register("prepare")
def prepare_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Fetch, convert and tokenise, on the head; the model writes batches of text, as many as their shares of the sequences take."""
    weights = shapes.parameters * DTYPES[params.prepare.dtype].itemsize
    write = Demand(read=weights, written=weights, host=CONVERSION * shapes.parameters)
    units = {"model": (write, ())} | own_text_units(shapes, params.prepare)
    held, _ = resident(shapes, params, params.prepare.dtype)
    return StageCost(units, peak=weights, published=weights, memory=held, dtype=params.prepare.dtype)


@STAGE_COSTS.register("capture")
def capture_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """As `capture.placement` says; see `capture_costs`."""
    own = count_draws(params.capture, params.prepare.calibration_sequences * params.prepare.sequence_length)
    return CAPTURE_COSTS.lookup(own.placement)(shapes, params.model_copy(update={"capture": own}), workers)


@STAGE_COSTS.register("kronecker")
def kronecker_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Layer by layer: its gradients against the factors, or the power steps that find better ones. Input by input: ρ."""
    sequences, own = params.prepare.calibration_sequences, params.capture
    makes_factors = params.kronecker.estimator != "kfac"
    layers, factors = {}, list[Shapes]()
    for layer in shapes.layers:
        n, m = layer.outputs, layer.inputs
        columns = sequences * {"sketch": min(own.sketch_rank, n, m), "exact": min(n, m)}.get(own.gradients, 0)
        step = 2.0 * columns * (n * n + m * m)
        norm = min(float(columns) ** 2 * (n + m), 2.0 * n * m * (columns + sequences**2))
        products = norm + step * (1 + (POWER_STEPS if makes_factors else 0))
        read = 4 * columns * (n + m) + 4 * (n * n + m * m)
        written = 4 * (n * n + m * m) if makes_factors else 0
        layers[layer.name] = Demand(products=products, read=read, written=written, traffic=2 * read)
        if makes_factors:
            factors.append({f"{layer.name}/A": (m, m), f"{layer.name}/B": (n, n)})
    published = gathered_bytes(factors, joined_bytes) if factors else 0
    largest = max(
        4 * (2 * (x.outputs**2 + x.inputs**2) + sequences * own.sketch_rank * (x.outputs + x.inputs))
        for x in shapes.layers
    )
    units = of_bundles(layers, shapes.layers)
    if own.tokens_per_sequence:
        inputs = by_group(layer for layer in shapes.layers if not layer.stack)
        groups = {f"dependence.{name}": members for name, members in inputs.items()}
        scores = {name: dependence_demand(members, params) for name, members in groups.items()}
        units |= shared(scores, {name: sum(one.dense_numbers for one in members) for name, members in groups.items()})
    return StageCost(units, peak=published, published=published, memory=largest)


def shared(demands: Mapping[str, Demand], sizes: Mapping[str, int]) -> dict[str, tuple[Demand, tuple[str, ...]]]:
    """Units of pieces, of which small ones share one; see `Scratch.map`."""
    return {names[0]: (sum((demands[name] for name in names), Demand()), ()) for names in share(sizes)}


def of_bundles(
    demands: Mapping[str, Demand], layers: Sequence[LinearLayer]
) -> dict[str, tuple[Demand, tuple[str, ...]]]:
    """Units of layers, some experts together."""
    pieces = bundles(layers)
    together = {name: sum((demands[layer.name] for layer in some), Demand()) for name, some in pieces.items()}
    return shared(together, {name: sum(layer.dense_numbers for layer in some) for name, some in pieces.items()})


def dependence_demand(members: Sequence[LinearLayer], params: Params) -> Demand:
    """ρ of one input: three kernels of its tokens, two of them whitened, and PASSES_PER_DRAW of all for every draw."""
    inputs, outputs = members[0].inputs, sum(layer.outputs for layer in members)
    captured = params.prepare.calibration_sequences * params.capture.tokens_per_sequence
    tokens = min(MOST_TOKENS, captured)
    return Demand(
        eigen=2.0 * tokens * inputs * outputs + 6.0 * tokens**2 * inputs + 6.0 * tokens**3,
        traffic=8.0 * PASSES_PER_DRAW * params.kronecker.dependence_draws * tokens**2,
        read=4.0 * captured * (inputs + outputs) + 4.0 * inputs * outputs,
    )


@STAGE_COSTS.register("subspace")
def subspace_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """One group of layers that share their input a unit: roots of both metrics, the products, the decomposition."""
    inputs, outputs = METRIC_ROOTS.get(params.subspace.metric, (True, True))
    groups = by_group(shapes.layers)
    units = {}
    for name, some in bundles(members[0] for members in groups.values()).items():
        own = Demand()
        for first in some:
            own = own + input_group_demand(first, inputs and root_work(params.subspace.input_damping))
            for layer in groups[first.name]:
                own = own + basis_demand(layer, outputs and root_work(params.subspace.output_damping))
        units[name] = (own, ())
    bases = [basis_shapes(members) for members in by_group(shapes.layers).values()]
    published = gathered_bytes(bases, joined_bytes)
    return StageCost(
        units,
        peak=published,
        published=published,
        memory=max(8.0 * (2.5 * (x.outputs**2 + x.inputs**2) + 6 * x.outputs * x.inputs) for x in shapes.layers),
    )


METRIC_ROOTS = {"svd": (False, False), "fwsvd": (False, False), "asvd": (False, False), "svd_llm": (True, False)}
"""Metrics whose input or output side needs no root of a full matrix; the others need both."""


def root_work(damping: float | str) -> float:
    """Operations / p³ of the root of a full metric: by its eigenvectors, or triangular where a given damping makes it definite."""
    return DECOMPOSITION["eigen" if isinstance(damping, str) or damping == 0 else "cholesky"]


def input_group_demand(layer: LinearLayer, root: float) -> Demand:
    """The root of a group's input metric, found once."""
    m = float(layer.inputs)
    return Demand(eigen=root * m**3, read=4 * m * m) if root else Demand(read=4 * m)


def basis_demand(layer: LinearLayer, root: float) -> Demand:
    """The root of a layer's output metric, two weighted products, the SVD, and the components from it."""
    n, m = float(layer.outputs), float(layer.inputs)
    r, most = min(n, m), max(n, m)
    products = 4 * n * m * (n + m) + 4 * n * m * r
    svd = DECOMPOSITION["svd"] * most * r * r
    return Demand(eigen=root * n**3 + products / 10, svd=svd, read=4 * (n * m + n * n), written=4 * r * (n + m))


@STAGE_COSTS.register("ranks")
def ranks_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """From the spectra alone on the head; FermiGrad descends on the network, measured allocators run it once a candidate."""
    length = params.prepare.sequence_length
    spectra = 8.0 * sum(min(layer.outputs, layer.inputs) for layer in shapes.layers)
    table = Demand(host=400 * spectra / 8, read=2 * spectra)
    passes = NETWORK_PASSES.get(params.ranks.allocator, lambda params, layers: 0)(params, len(shapes.layers))
    model = forward_operations(shapes, passes * length, length)
    held, loads = resident(shapes, params, params.ranks.fermigrad.dtype) if passes else (0.0, 0.0)
    return StageCost({"ranks": (table + Demand(model=model), ())}, memory=3 * held, loads=loads)  # both factors, whole


GROUPS = 7 * PARTS  # of layers: as many kinds in a decoder block as most have
NETWORK_PASSES: dict[str, Callable[[Params, int], int]] = {
    "fermigrad": lambda params, layers: (
        8 * params.ranks.fermigrad.steps * params.ranks.fermigrad.batches * params.ranks.fermigrad.sequences
    ),
    "corrected": lambda params, layers: (
        (4 * GROUPS if params.ranks.widths else 1 + GROUPS) * min(SEQUENCES, params.prepare.tuning_sequences)
    ),
    "sensitivity": lambda params, layers: layers * params.ranks.measured.levels * params.ranks.measured.sequences,
    "ilp": lambda params, layers: layers * params.ranks.measured.levels * params.ranks.measured.sequences,
}
"""Forward passes of one sequence that an allocator takes; FermiGrad's step is about eight (both factors whole, backward, dense)."""


@STAGE_COSTS.register("factorize")
def factorize_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Layer by layer: cut, pivot, round, measure; in float64 on a processor. Then the checkpoint, on the head."""
    keep = 1 - params.ranks.ratio
    gauges = {layer.name: gauge_demand(layer, keep, params.ranks.storage) for layer in shapes.layers}
    units = of_bundles(gauges, shapes.layers)
    dense = shapes.parameters * DTYPES[params.factorize.dtype or params.prepare.dtype].itemsize
    written = dense - shapes.targeted * params.ranks.ratio * dense / shapes.parameters
    exports = written + (dense if params.factorize.dense_export else 0)
    units |= refinement_units(shapes, params)
    units |= healing_unit(shapes, params)
    both = healing_memory(shapes, params) if params.factorize.heal.passes else 0.0
    refined = resident(shapes, params, "float32")[0] if params.factorize.refine.passes else 0.0
    return StageCost(
        units,
        serial=Demand(read=exports, written=exports),
        peak=dense * (3 if params.factorize.dense_export else 2),
        published=exports,
        memory=max(both, refined, *(8.0 * 6 * layer.outputs * layer.inputs for layer in shapes.layers)),
    )


def healing_memory(shapes: ModelShapes, params: Params) -> float:
    """Both models and, in float32, four times the factors and once more for each sequence that a thread computes; what a step's forward passes leave
    for the backward pass, and both models' logits."""
    heal = params.factorize.heal
    tokens = heal.batch_size * params.prepare.sequence_length
    factors = 4.0 * (1 - params.ranks.ratio) * shapes.targeted
    step = activation_bytes(shapes, shapes.layers, tokens, "float32") + LOGIT_BYTES * tokens * shapes.vocabulary
    return 8.0 * shapes.parameters + (4 + min(heal.threads, heal.batch_size)) * factors + step


def healing_unit(shapes: ModelShapes, params: Params) -> dict[str, tuple[Demand, tuple[str, ...]]]:
    """All factors together: a step is a forward pass of the dense model and three forward passes' worth of the other; held-out losses before and after."""
    own, passes = params.prepare, params.factorize.heal.passes
    if not passes:
        return {}
    _, text = text_sizes(own.calibration_sequences, own.training_sequences)
    looks = own.sequence_length * (4 * passes * text + 4 * own.tuning_sequences)
    before = (f"refined.{shapes.blocks - 1}",) if params.factorize.refine.passes else ()
    return {"healed": (Demand(model=forward_operations(shapes, looks, own.sequence_length)), before)}


def refinement_units(shapes: ModelShapes, params: Params) -> dict[str, tuple[Demand, tuple[str, ...]]]:
    """One unit a block, each after the one before: its hidden states, held-out losses, and three forward passes' worth a training step."""
    own, length = params.prepare, params.prepare.sequence_length
    text, _ = text_sizes(own.calibration_sequences, own.training_sequences)
    passes = passes_over(text, params.factorize.refine)
    if not passes:
        return {}
    tokens, held_out = length * text, length * own.tuning_sequences
    looks = (
        tokens * (4 * passes + 2) + 6 * held_out
    )  # trained and its dense target; both networks' outputs; before and after
    states = 8.0 * shapes.hidden * (tokens + held_out)
    block = Demand(
        model=forward_operations(shapes, looks, length, logits=False) / shapes.blocks,
        read=states * (2 * passes + 1),
        written=states,
    )
    names = [f"refined.{number}" for number in range(shapes.blocks)]
    return {name: (block, (names[number - 1],) if number else ()) for number, name in enumerate(names)}


def gauge_demand(layer: LinearLayer, keep: float, storage: str) -> Demand:
    """Of a layer that keeps the share `keep` of its numbers: pivoted QR, rounding with feedback, and three products."""
    n, m = float(layer.outputs), float(layer.inputs)
    rank = kept_rank(n, m, keep, storage)
    pivoting = 4 * min(n, m) * rank**2 + 2 * rank**2 * (n + m) if storage in PIVOTED_SIDES else 0.0
    return Demand(host=pivoting + 6 * n * m * rank, read=4 * rank * (n + m) + 4 * n * m, written=4 * keep * n * m)


def kept_rank(n: float, m: float, keep: float, storage: str) -> float:
    """The rank r with r (n + m) = c n m numbers, or r (n + m - r) for the pivoted gauge."""
    if storage == "factors":
        return keep * n * m / (n + m)
    return (n + m - ((n + m) ** 2 - 4 * keep * n * m) ** 0.5) / 2


@STAGE_COSTS.register("evaluate")
def evaluate_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Both models on the evaluation sequences and the questions, a few batches a unit."""
    own, length, sequences = params.evaluate, params.prepare.sequence_length, params.prepare.evaluated_sequences
    step = own.batch_size * BATCHES_PER_SHARD
    asked = params.prepare.question_count if params.prepare.questions else 0
    units = {}
    for first in range(0, sequences, step):
        tokens = min(step, sequences - first) * length
        logits = LOGIT_TRAFFIC * tokens * shapes.vocabulary
        units[f"losses-{first}"] = (Demand(model=2 * forward_operations(shapes, tokens, length), traffic=logits), ())
    for first in range(0, asked, QUESTIONS_PER_UNIT):
        tokens = min(QUESTIONS_PER_UNIT, asked - first) * QUESTION_TOKENS
        for model in ("dense", "compressed"):
            units[f"{model}-{first}"] = (Demand(model=forward_operations(shapes, tokens, QUESTION_TOKENS)), ())
    units |= greedy_answers(shapes, params)
    held, loads = resident(shapes, params, own.dtype, models=2 - params.ranks.ratio)
    memory = held + LOGIT_BYTES * own.batch_size * length * shapes.vocabulary
    return StageCost(units, memory=memory, loads=loads, dtype=own.dtype)


def resident(shapes: ModelShapes, params: Params, dtype: str, models: float = 1.0) -> tuple[float, float]:
    """Bytes of models in memory, and those that a worker reads before its first unit: all weights, or the largest block or embedding and none."""
    size = DTYPES[dtype].itemsize
    if params.capture.placement == STREAMED:
        return max([*shapes.block_sizes.values(), shapes.vocabulary * shapes.hidden]) * float(size), 0.0
    weights = models * shapes.parameters * size
    return weights, weights


@STAGE_COSTS.register("report")
def report_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Pictures and one page, on the head."""
    return StageCost({"page": (Demand(host=3e9), ())})
