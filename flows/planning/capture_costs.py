"""Stage capture on paper, by `capture.placement`: with the whole model in memory, and with one decoder block.

Shapes: S sequences of T tokens, N = S T; n outputs, m inputs, k sketch rank; V vocabulary, h hidden width, K decoder blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from fisherfold.network.layers import LinearLayer, by_group
from fisherfold.network.models import DTYPES
from fisherfold.run.group_writer import GroupSize
from fisherfold.run.params import CaptureParams, Params
from fisherfold.run.registry import Registry
from fisherfold.statistics.gradient_forms import GRADIENT_FORMS, Shapes
from fisherfold.statistics.placement import disk_bytes, sums_bytes
from fisherfold.statistics.shard import layer_slices
from fisherfold.statistics.stored_sums import sum_shapes
from fisherfold.statistics.streamed_placement import LEAVES_IN_WORK
from fisherfold.statistics.tree_sum import Leaf, cut_leaves, portions
from flows.planning.demand import (
    Demand,
    StageCost,
    forward_operations,
    gram_operations,
    pass_operations,
    sketch_operations,
)
from flows.planning.group_shapes import copied_bytes, gathered_bytes, group_bytes, joined_bytes, kept_bytes
from flows.planning.shapes import ModelShapes

GRADIENT_TRAFFIC = 6  # times that a sequence's gradient passes through memory: written, squared, added up, sketched
CAPTURE_COSTS: Registry[Callable[[ModelShapes, Params, int], StageCost]] = Registry("capture.placement")
"""By placement: (shapes, params, workers) -> the cost of stage capture."""
CAPTURE_MEMORY: Registry[Callable[[ModelShapes, Params], float]] = Registry("capture.placement")
"""By placement: bytes that a unit of stage capture holds on its device."""


@CAPTURE_COSTS.register("whole")
def whole_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Leaves of sequences times slices of layers, and what adds up their sums."""
    own, length, sequences = params.capture, params.prepare.sequence_length, params.prepare.calibration_sequences
    slices, leaves = layer_slices(shapes.layers, own.layers_per_pass), _leaves(params)
    units = {}
    sums = [_sum_files(part, own, len(leaves)) for part in slices]
    files = [[group_bytes(one) for one in part] for part in sums]
    passes = Demand(model=pass_operations(shapes, own.sequences_per_shard * length, length, own.draws))
    for index, part in enumerate(slices):
        for leaf in leaves:
            demand = (passes + sums_demand(shapes, part, own, length)) * _share(leaf, params)
            written = sum(files[index]) + _kept(leaf, params, part, index == 0)
            units[f"{index}.{leaf.first}"] = (demand + Demand(written=written), ())
        after = tuple(f"{index}.{leaf.first}" for leaf in leaves)
        for number, size in enumerate(files[index] if len(leaves) > 1 else ()):
            traffic = (len(leaves) + 1.0) * size
            units[f"{index}.sum-{number}"] = (Demand(read=len(leaves) * size, written=size, traffic=traffic), after)
    return StageCost(
        units,
        peak=disk_bytes(shapes.layers, own, sequences, workers),
        published=_published(slices, sums, params),
        memory=whole_memory(shapes, params),
        loads=shapes.parameters * DTYPES[own.dtype].itemsize,
        dtype=own.dtype,
    )


@CAPTURE_MEMORY.register("whole")
def whole_memory(shapes: ModelShapes, params: Params) -> float:
    """The model, the sums of a slice of the layers, and a batch."""
    own = params.capture
    tokens = own.batch_size * params.prepare.sequence_length
    sums = max(sums_bytes(part, own) for part in layer_slices(shapes.layers, own.layers_per_pass))
    weights = shapes.parameters * DTYPES[own.dtype].itemsize
    return weights + 2 * sums + activation_bytes(shapes, shapes.layers, tokens, own.dtype)  # half of each sum is stored


@CAPTURE_COSTS.register("streamed")
def streamed_cost(shapes: ModelShapes, params: Params, workers: int) -> StageCost:
    """Leaf by leaf forward through the blocks and backward, each step a unit."""
    own, leaves, parts = params.capture, _leaves(params), _parts(shapes, params)
    sums = [sum_shapes(part, own.gradients != "none") for _, part in parts]
    units: dict[str, tuple[Demand, tuple[str, ...]]] = {}
    files = [group_bytes(one) for one in sums]
    for number in range(len(leaves)):
        units |= dict(_streamed_units(shapes, params, leaves, number, parts, files))
    return StageCost(
        units,
        peak=_streamed_peak(shapes, params, leaves, parts, files, min(LEAVES_IN_WORK, workers, len(leaves))),
        published=_published([part for _, part in parts], [[one] for one in sums], params),
        memory=streamed_memory(shapes, params),
        dtype=own.dtype,
    )


@CAPTURE_MEMORY.register("streamed")
def streamed_memory(shapes: ModelShapes, params: Params) -> float:
    """One block, the sums of its part and a batch, or an end of the model (V h numbers) and a batch's logits."""
    own = params.capture
    tokens, size = own.batch_size * params.prepare.sequence_length, DTYPES[own.dtype].itemsize
    batch = {name: activation_bytes(shapes, layers, tokens, own.dtype, False) for name, layers in _blocks(shapes)}
    held = [
        shapes.block_sizes[name] * size + 2 * sums_bytes(part, own) + batch[name]
        for name, part in _parts(shapes, params)
    ]
    return max([*held, (shapes.vocabulary * shapes.hidden + 4 * tokens * shapes.vocabulary) * size])


def _parts(shapes: ModelShapes, params: Params) -> list[tuple[str, list[LinearLayer]]]:
    """Some layers of one block at a time, with its name."""
    most = params.capture.layers_per_pass
    return [(name, part) for name, layers in _blocks(shapes) for part in layer_slices(layers, most)]


def _streamed_units(
    shapes: ModelShapes,
    params: Params,
    leaves: Sequence[Leaf],
    number: int,
    parts: Sequence[tuple[str, Sequence[LinearLayer]]],
    files: Sequence[int],
) -> Iterator[tuple[str, tuple[Demand, tuple[str, ...]]]]:
    """The units of one leaf in their order: embedding, blocks forward, head, parts backward."""
    own, length, leaf = params.capture, params.prepare.sequence_length, leaves[number]
    size, tokens = DTYPES[own.dtype].itemsize, _tokens(leaf, params)
    boundary, end = tokens * shapes.hidden * size, shapes.vocabulary * shapes.hidden * size
    handed_down = own.draws * boundary
    forward = forward_operations(shapes, tokens, length, logits=False) / len(shapes.block_sizes)
    attention = 4.0 * tokens * length * shapes.attention_width
    logits = 2.0 * tokens * shapes.vocabulary * shapes.hidden
    in_hand = number - LEAVES_IN_WORK
    behind = f"{number}.embedded"
    yield behind, (Demand(read=end, written=boundary), (f"{in_hand}.{len(parts)}",) if in_hand >= 0 else ())
    for block, numbers in enumerate(shapes.block_sizes.values()):
        step = Demand(model=forward, read=boundary + numbers * size, written=boundary)
        yield f"{number}.forward-{block}", (step, (behind,))
        behind = f"{number}.forward-{block}"
    yield (
        f"{number}.head",
        (Demand(model=(1 + own.draws) * logits, read=boundary + end, written=handed_down), (behind,)),
    )
    behind = f"{number}.head"
    for index, (block, part) in reversed(list(enumerate(parts))):
        earlier = (f"{number - 1}.{len(parts) - index}",) if number else ()
        demand = Demand(
            model=(1 + own.draws) * forward + own.draws * attention,  # once more, and back
            read=boundary + handed_down + shapes.block_sizes[block] * size + (files[index] if number else 0),
            written=handed_down + files[index] + _kept(leaf, params, part, index == 0),
        )
        name = f"{number}.{len(parts) - index}"
        yield name, (demand + sums_demand(shapes, part, own, length) * _share(leaf, params), (behind, *earlier))
        behind = name


def _streamed_peak(
    shapes: ModelShapes,
    params: Params,
    leaves: Sequence[Leaf],
    parts: Sequence[tuple[str, Sequence[LinearLayer]]],
    files: Sequence[int],
    in_work: int,
) -> float:
    """Bytes on disk at most: at the turn of a leaf K + 1 boundaries and a gradient of each draw, on the way back one fewer a block while sums come;
    or what is gathered at the end.
    """
    held, peak, boundary = 0.0, 0.0, 0.0
    gradient = params.capture.draws
    for number, leaf in enumerate(leaves):
        boundary = _boundary_bytes(shapes, params, _sequences(leaf, params))
        states = len(shapes.block_sizes) + 1
        peak, behind = max(peak, held + (states + gradient) * boundary), None
        for index, (block, part) in reversed(list(enumerate(parts))):
            states -= block != behind
            behind = block
            held += files[index] + _kept(leaf, params, part, index == 0)
            peak = max(peak, held + (states + 2 * gradient) * boundary)
            held -= files[index] if number else 0  # those of the leaf before, which these go on from
    kept = [
        [
            _kept_of_shard(tuple(part), params.capture, size, params.prepare.sequence_length, index == 0)
            for index, (_, part) in enumerate(parts)
        ]
        for leaf in leaves
        for size in _shard_sizes(leaf, params)
    ]
    copied = sum(copied_bytes(sizes) for sizes in (files, *kept))
    return max(peak + (in_work - 1) * (len(shapes.block_sizes) + 1 + gradient) * boundary, held + copied)


def _boundary_bytes(shapes: ModelShapes, params: Params, sequences: int) -> int:
    """The file of the hidden states of so many sequences."""
    size = GroupSize()
    for number in range(sequences):
        size.array(str(number), (params.prepare.sequence_length, shapes.hidden), DTYPES[params.capture.dtype])
    return size.total


def _blocks(shapes: ModelShapes) -> list[tuple[str, list[LinearLayer]]]:
    """The layers of every decoder block that has any; stage capture refuses those that lie in none."""
    found = [(name, [x for x in shapes.layers if x.name.startswith(f"{name}.")]) for name in shapes.block_sizes]
    return [(name, layers) for name, layers in found if layers]


def _leaves(params: Params) -> list[Leaf]:
    shards = -(-params.prepare.calibration_sequences // params.capture.sequences_per_shard)
    return cut_leaves(shards, params.capture.leaves)


def _sequences(leaf: Leaf, params: Params) -> int:
    """Of a leaf, whose last shard may be short."""
    first = leaf.first * params.capture.sequences_per_shard
    return min(params.prepare.calibration_sequences - first, leaf.shards * params.capture.sequences_per_shard)


def _tokens(leaf: Leaf, params: Params) -> int:
    return _sequences(leaf, params) * params.prepare.sequence_length


def _share(leaf: Leaf, params: Params) -> float:
    """A leaf in whole shards."""
    return _sequences(leaf, params) / params.capture.sequences_per_shard


def _kept(leaf: Leaf, params: Params, layers: Sequence[LinearLayer], with_positions: bool) -> int:
    """Bytes of the files of what is kept of a leaf's sequences."""
    own, length = params.capture, params.prepare.sequence_length
    sizes = _shard_sizes(leaf, params)
    return sum(_kept_of_shard(tuple(layers), own, size, length, with_positions) for size in sizes)


@lru_cache(4096)
def _kept_of_shard(
    layers: tuple[LinearLayer, ...], params: CaptureParams, sequences: int, length: int, with_positions: bool
) -> int:
    """`kept_bytes`, which many shards and leaves ask for with the same words."""
    return kept_bytes(layers, params, sequences, length, with_positions)


def _shard_sizes(leaf: Leaf, params: Params) -> list[int]:
    """Sequences of every shard of a leaf."""
    whole, rest = divmod(_sequences(leaf, params), params.capture.sequences_per_shard)
    return [params.capture.sequences_per_shard] * whole + ([rest] if rest else [])


def _published(parts: Sequence[Sequence[LinearLayer]], sums: Sequence[Sequence[Shapes]], params: Params) -> float:
    """Bytes of the output: the sums, and what is kept of every shard, gathered from all parts."""
    own, sequences, length = params.capture, params.prepare.calibration_sequences, params.prepare.sequence_length
    shards = -(-sequences // own.sequences_per_shard)
    last = sequences - (shards - 1) * own.sequences_per_shard
    kept = [_kept_files(parts, own, size, length) for size in (own.sequences_per_shard, last)]
    return gathered_bytes([one for part in sums for one in part], joined_bytes) + (shards - 1) * kept[0] + kept[1]


def _kept_files(slices: Sequence[Sequence[LinearLayer]], params: CaptureParams, sequences: int, length: int) -> int:
    """Bytes of the files that hold what is kept of a shard."""

    def size(parts: Sequence[tuple[int, Sequence[LinearLayer]]]) -> int:
        layers = [layer for _, part in parts for layer in part]
        return _kept_of_shard(tuple(layers), params, sequences, length, parts[0][0] == 0)

    return gathered_bytes(list(enumerate(slices)), size)


def _sum_files(layers: Sequence[LinearLayer], params: CaptureParams, leaves: int) -> list[Shapes]:
    """Shapes of what the files of the sums of a slice of the layers hold."""
    shapes = sum_shapes(layers, params.gradients != "none")
    parts = portions(sums_bytes(layers, params)) if leaves > 1 else 1
    names = sorted(shapes)
    return [{name: shapes[name] for name in names[number::parts]} for number in range(parts)]


def sums_demand(shapes: ModelShapes, layers: Sequence[LinearLayer], params: CaptureParams, length: int) -> Demand:
    """Grams, gradients and sketches of one shard, for some of the layers."""
    sequences = params.sequences_per_shard
    tokens = sequences * length
    products, traffic = 0.0, 0.0
    form = GRADIENT_FORMS.lookup(params.gradients)
    for members in by_group(layers).values():
        seen = shapes.seen(members[0]) * tokens
        products += gram_operations(seen, members[0].inputs) * (1 + params.draws if len(members) > 1 else 1)
    for layer in layers:
        n, m, seen = layer.outputs, layer.inputs, shapes.seen(layer) * tokens
        products += gram_operations(seen, n) * params.draws
        traffic += 4 * seen * (n + m)
        if form is not None:
            one = form(layer, 1, 0)
            sketched = (
                sketch_operations(layer, length, min(params.sketch_rank, n, m), one.needs_gradients(length))
                if params.gradients == "sketch"
                else 0.0
            )
            products += 2.0 * tokens * n * m + sequences * sketched
            traffic += 4.0 * GRADIENT_TRAFFIC * sequences * n * m
    return Demand(products=products, traffic=traffic)


def activation_bytes(
    shapes: ModelShapes, layers: Sequence[LinearLayer], tokens: int, dtype: str, logits: bool = True
) -> float:
    """What a forward pass leaves for the backward pass: inputs and outputs of the layers, and logits with their gradient."""
    per_token = sum(shapes.seen(layer) * (layer.outputs + layer.inputs) for layer in layers)
    per_token += 4 * shapes.vocabulary if logits else 0
    return tokens * per_token * DTYPES[dtype].itemsize
