"""Low rank beside fewer bits, at equal bytes: perplexity on two texts and KL on the model's own answers.

    python benchmarks/bytes.py --project . --folder /tmp/bytes --second other.txt            # all rows; goes on where it was stopped
    python benchmarks/bytes.py --project . --folder /tmp/bytes --rows dense-4,ours-3.5       # some of them
    python benchmarks/bytes.py --project . --folder /tmp/bytes --table                       # what has been measured
    python benchmarks/bytes.py --project . --folder /tmp/bytes --layers model.layers.10.mlp.up_proj      # one layer, in seconds

Wants a project whose stages up to `subspace` have run, with a Llama or Gemma 3. Every layer and every row is kept in --folder; with --minutes the
script stops in time and the next call goes on.

The demo models lie on a 4-bit grid (they come from GGUF files), so rounding them to 4 bits would cost nothing. They are measured in other coordinates, in
which the function is the same and the grid is gone (off_grid.py). The bytes that are counted are those of the targeted layers, by number of the dense
model's weights.

Rows of others want their packages: `pip install llama-cpp-python bitsandbytes`.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from figures import at_least, at_most
from llama_cpp_rows import layer_names, quantise, read_layers, write_whole
from off_grid import Layer, OffGrid, off_grid, same_function
from transformers import AutoTokenizer, PreTrainedModel

from fisherfold.allocators.corrected import groups_of
from fisherfold.allocators.cost import DENSE, SIXTEENTHS
from fisherfold.allocators.loss_weights import (
    UNWEIGHTED,
    LossWeights,
    divergences,
    errors_of,
    foresee,
    site_weights,
)
from fisherfold.allocators.widths import UNROUNDED, Option, cheapest_loss, options_of
from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.own_answers import Conversation, conversations
from fisherfold.export.gauges import gauge, product
from fisherfold.linalg.factor_rounding import round_inputs_pivoted, round_outputs_pivoted, round_plain
from fisherfold.linalg.group_grid import GROUP, Rounded, round_nearest
from fisherfold.linalg.kronecker_rounding import round_under
from fisherfold.linalg.rounding_losses import RoundingUnits, rounding_units
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace

NF4_BLOCK = 64  # of bitsandbytes
ANSWERS = 16  # own answers that are compared
TEXT = 16  # sequences of each text
MEASURED_BITS = 4  # whose cost is measured; of 8 it is a part of 4⁻⁴


@dataclass(frozen=True)
class Row:
    """A way to keep the model.

    Attributes:
        widths: that an allocation chooses from, or the one of all layers.
        bits: a weight may take on average; None: full rank and the one width.
        whole: no rank is cut, bits alone are shared out.
        nearest: rounded to nearest, not by feedback.
        ranks_of: another row, whose ranks and storage it has; its widths are one.
        storage: of factors.
        corrected: chosen by what each group of layers was measured to lose, as by allocator `corrected`.
        room_of: another row, of whose bits it takes the share `bits`.
        tool: another than ours, which makes the row alone; of TOOLS.
        mixture: of llama.cpp's quantiser.
        importance: given to that quantiser: the mean square of every input.
    """

    widths: tuple[int, ...] = ()
    bits: float | None = None
    whole: bool = False
    nearest: bool = False
    ranks_of: str | None = None
    storage: str = "pivoted"
    corrected: bool = False
    room_of: str | None = None
    tool: str | None = None
    mixture: str = ""
    importance: bool = False


ROWS = {
    "dense-16": Row((UNROUNDED,)),
    "dense-4-nearest": Row((4,), nearest=True),
    "dense-4": Row((4,)),
    "ours-4.5": Row((UNROUNDED, 8, 4), 4.5),
    "ours-3.5": Row((UNROUNDED, 8, 4), 3.5),
    "ours-3.5-all": Row((8, 4, 3, 2), 3.5),
    "dense-3": Row((3,)),
    "ours-2.7": Row((UNROUNDED, 8, 4), 2.7),
    "ours-2.7-all": Row((8, 4, 3, 2), 2.7),
    "dense-3-nearest": Row((3,), nearest=True),
    "dense-2": Row((2,)),
    "rank-9.6": Row((UNROUNDED,), 9.6),  # 40 % of the numbers removed
    "rank-5.1": Row((8,), 9.6 * 8.5 / 16),  # the same room for numbers; orders take more of it
    "rank-2.7": Row((4,), 9.6 * 4.5 / 16),
    "rank-9.6-8": Row((8,), ranks_of="rank-9.6"),
    "rank-9.6-4": Row((4,), ranks_of="rank-9.6"),
    "plain-9.6": Row((UNROUNDED,), 9.6, storage="factors"),
    "plain-9.6-8": Row((8,), ranks_of="plain-9.6", storage="factors"),
    "plain-9.6-4": Row((4,), ranks_of="plain-9.6", storage="factors"),
    "rank-9.6-8-nearest": Row((8,), ranks_of="rank-9.6", nearest=True),
    "rank-9.6-4-nearest": Row((4,), ranks_of="rank-9.6", nearest=True),
    "dense-8": Row((8,)),
    "dense-8-nearest": Row((8,), nearest=True),
    "rank-4.5": Row((UNROUNDED,), 4.5),
    "nf4": Row(tool="bitsandbytes"),
    "q8_0": Row(tool="llama.cpp", mixture="Q8_0"),
    "q4_k_m": Row(tool="llama.cpp", mixture="Q4_K_M"),
    "q4_k_m-importance": Row(tool="llama.cpp", mixture="Q4_K_M", importance=True),
    "q2_k": Row(tool="llama.cpp", mixture="Q2_K"),
    "q2_k-importance": Row(tool="llama.cpp", mixture="Q2_K", importance=True),
    "ours-q4_k_m": Row((UNROUNDED, 8, 4), 1.0, room_of="q4_k_m"),
    "bits-q4_k_m": Row((UNROUNDED, 8, 4), 1.0, whole=True, room_of="q4_k_m"),
    "ours-q2_k": Row((UNROUNDED, 8, 4), 1.0, room_of="q2_k"),
    "ours-0.6-q4_k_m": Row((UNROUNDED, 8, 4), 0.6, room_of="q4_k_m"),
    "ours-0.6-q4_k_m-all": Row((8, 4, 3, 2), 0.6, room_of="q4_k_m"),
    "corrected-4.5": Row((UNROUNDED, 8, 4), 4.5, corrected=True),
    "corrected-q4_k_m": Row((UNROUNDED, 8, 4), 1.0, corrected=True, room_of="q4_k_m"),
    "corrected-q2_k": Row((UNROUNDED, 8, 4), 1.0, corrected=True, room_of="q2_k"),
    "corrected-0.6-q4_k_m": Row((UNROUNDED, 8, 4), 0.6, corrected=True, room_of="q4_k_m"),
    "corrected-0.6-q4_k_m-all": Row((8, 4, 3, 2), 0.6, corrected=True, room_of="q4_k_m"),
}


def kept_units(moved: OffGrid, folder: Path) -> dict[str, dict]:
    """Predicted losses of rounding, of every layer, at one bit."""
    found = {}
    for name in moved.sites:
        path = folder / "units" / f"{name}.npz"
        if not path.exists():
            layer = moved.layer(name)
            units = rounding_units(
                layer.W, layer.left, layer.right, moved.sigma[name], layer.metric.inputs, layer.metric.outputs
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, dense=units.dense, components=units.components)
            yield_time()
        found[name] = dict(np.load(path))
    return found


def kept_weights(moved: OffGrid, folder: Path) -> dict[str, LossWeights]:
    """Measured costs of cutting and of rounding to MEASURED_BITS, as allocator `corrected` of stage `ranks` measures them, in the new coordinates."""
    path, names, sites = folder / "corrections.json", list(moved.sites), list(moved.sites.values())
    units, groups = predicted_units(moved, folder), groups_of(sites)
    foreseen = {
        row: foresee(moved.sigma[name], np.arange(0, sites[row].full_rank + 1, GROUP), units[name], MEASURED_BITS)
        for row, name in enumerate(names)
    }
    if not path.exists():
        model, measured = moved.whole(), []
        tuning = read_sequences(moved.workspace.table("tuning"), model.config.vocab_size)
        for rows in groups.values():
            errors = {names[row]: errors_in(moved.layer(names[row]), foreseen[row].ranks) for row in rows}
            measured.append(divergences(model, tuning, errors))
            yield_time()
        path.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    found = site_weights(groups, foreseen, dict(zip(groups, json.loads(path.read_text(encoding="utf-8")))))
    return {name: found.of_sites[row] for row, name in enumerate(names)}


def errors_in(layer: Layer, ranks: Sequence[int]) -> dict[str, np.ndarray]:
    """What is measured of a layer."""
    return errors_of(layer.site.name, layer.W, layer.left, layer.right, ranks, MEASURED_BITS, layer.metric)


def predicted_units(moved: OffGrid, folder: Path) -> dict[str, RoundingUnits]:
    """Predicted losses of rounding, of every layer."""
    return {
        name: RoundingUnits(float(own["dense"]), own["components"], moved.sigma[name])
        for name, own in kept_units(moved, folder).items()
    }


def plan_row(moved: OffGrid, folder: Path, row: Row) -> dict[str, Option]:
    """How every layer is kept."""
    same = plan_row(moved, folder, ROWS[row.ranks_of]) if row.ranks_of else None
    weights = kept_weights(moved, folder) if row.corrected else dict.fromkeys(moved.sites, UNWEIGHTED)
    options = [
        [option for option in own if not same or is_alike(option, same[name])]
        for name, own in offered(moved, folder, row, weights).items()
    ]
    most = sum(max(option.cost for option in own) for own in options)
    bits = row.bits and row.bits * (read_row(folder, row.room_of)["bits"] if row.room_of else 1)
    budget = most if bits is None else int(moved.numbers * bits * SIXTEENTHS / 8)
    return dict(zip(moved.sites, cheapest_loss(options, budget)))


def is_alike(one: Option, other: Option) -> bool:
    """In all but bits."""
    return (one.rank, one.storage) == (other.rank, other.storage)


def offered(moved: OffGrid, folder: Path, row: Row, weights: Mapping[str, LossWeights]) -> dict[str, list[Option]]:
    """Every option of every layer."""
    units, found = predicted_units(moved, folder), {}
    for name, site in moved.sites.items():
        ranks = np.append(np.arange(0, site.full_rank, GROUP), site.full_rank)
        ranks = ranks[-1:] if row.whole or (row.bits is None and not row.ranks_of) else ranks
        found[name] = options_of(site, moved.sigma[name], units[name], row.widths, ranks, row.storage, weights[name])
    return found


def kept_weight(layer: Layer, option: Option, nearest: bool) -> np.ndarray:
    """The product of what is stored."""
    if option.rank == 0:
        return np.zeros_like(layer.W)
    if option.storage == DENSE:
        return layer.W if option.bits == UNROUNDED else rounded_dense(layer, option.bits, nearest).values
    left, right = layer.left[:, : option.rank], layer.right[: option.rank]
    if option.bits == UNROUNDED:
        return left @ right
    stored = gauge(left, right, option.storage, torch.float64)
    parameters = dict(stored.parameters)
    up, down, order = parameters["up.weight"], parameters["down.weight"], parameters.get("order")
    if nearest:
        found_up, found_down = round_nearest(up, option.bits), round_nearest(down, option.bits)
    else:
        rounding: dict[str, Callable] = {
            "factors": lambda: round_plain(up, down, layer.W, option.bits, layer.metric),
            "pivoted_outputs": lambda: round_outputs_pivoted(down, up, order, layer.W, option.bits, layer.metric),
            "pivoted_inputs": lambda: round_inputs_pivoted(up, down, order, layer.W, option.bits, layer.metric),
        }
        factors = rounding[stored.kind]()
        found_up, found_down = factors.up, factors.down
    parameters |= {"up.weight": found_up.values, "down.weight": found_down.values}
    return product(stored.kind, parameters, *layer.W.shape)


def rounded_dense(layer: Layer, bits: int, nearest: bool) -> Rounded:
    if nearest:
        return round_nearest(layer.W, bits)
    return round_under(layer.W, bits, layer.metric.inputs, layer.metric.outputs)


def kept_layers(moved: OffGrid, folder: Path, plan: dict[str, Option], nearest: bool) -> Iterator[tuple]:
    """(module, weight, loss) of every layer, from the folder or made now: rows share what they have in common."""
    for module, option in plan.items():
        way = "nearest" if nearest else "feedback"
        path = folder / "layers" / f"{module}.{option.storage}.{option.rank}.{option.bits}.{way}.npz"
        if not path.exists():
            layer = moved.layer(module)
            weight = kept_weight(layer, option, nearest)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(
                path.with_suffix(".part.npz"),
                weight=weight.astype(np.float32),
                loss=layer.metric.loss(weight - layer.W),
            )
            path.with_suffix(".part.npz").rename(path)
            yield_time()
        kept = np.load(path)
        yield module, kept["weight"], float(kept["loss"])


def measure(moved: OffGrid, folder: Path, name: str, texts: dict[str, torch.Tensor]) -> dict:
    """Perplexities, divergence, bytes and losses of one row."""
    row, started = ROWS[name], time.monotonic()
    made = TOOLS[row.tool] if row.tool else rounded_by_plan
    layers, found = made(moved, folder, name)
    model, losses = moved.whole(), {}
    found["logits_differ"] = same_function(moved, model)
    for module, weight, loss in layers:
        model.get_submodule(module).weight.copy_(torch.from_numpy(weight))
        losses[module] = loss
    found["measured"] = sum(losses.values())
    found["layers"] = {module: [*found["layers"][module], loss] for module, loss in losses.items()}
    found |= {f"perplexity_{text}": perplexity(model, ids) for text, ids in texts.items()}
    if answers := conversations(pq.read_table(moved.workspace.table("answers")), None)[:ANSWERS]:  # a chat model's
        found["own_answers_kl"] = divergence(moved, model, answers)
    found["seconds"] = time.monotonic() - started
    return found


Made = tuple[Iterable[tuple[str, np.ndarray, float]], dict]
"""(module, weight, loss) of every layer, and what is known of the row."""


def rounded_by_plan(moved: OffGrid, folder: Path, name: str) -> Made:
    """The layers of one of our rows."""
    row = ROWS[name]
    plan = plan_row(moved, folder, row)
    for _ in kept_layers(moved, folder, plan, row.nearest):
        pass  # before a second model is in memory
    cost = sum(option.cost for option in plan.values())
    unweighted = offered(moved, folder, row, dict.fromkeys(moved.sites, UNWEIGHTED))
    losses = {
        module: next(own.loss for own in unweighted[module] if is_alike(own, option) and own.bits == option.bits)
        for module, option in plan.items()
    }
    return kept_layers(moved, folder, plan, row.nearest), {
        "bits": 8 * cost / SIXTEENTHS / moved.numbers,
        "dense_layers": sum(option.storage == DENSE for option in plan.values()),
        "widths": {str(bits): sum(option.bits == bits for option in plan.values()) for bits in row.widths},
        "predicted": sum(losses.values()),
        "layers": {module: [option.rank, option.bits, losses[module]] for module, option in plan.items()},
    } | ({"nats": sum(option.loss for option in plan.values()) / 2} if row.corrected else {})


def quantised_by_llama_cpp(moved: OffGrid, folder: Path, name: str) -> Made:
    """The layers as llama.cpp's quantiser leaves them, at the bytes that they take there; their loss is not looked at."""
    row, config = ROWS[name], moved.model.config
    whole, path = folder / "whole.gguf", folder / f"{name}.gguf"
    if not whole.exists():
        write_whole(whole, moved.whole(), moved.workspace.model)
    importance = {}
    if row.importance:
        names = layer_names(config, moved.sites)
        importance = {names[module]: np.diag(moved.layer(module).metric.A) for module in moved.sites}
    quantise(whole, path, row.mixture, importance)
    layers = read_layers(path, config, moved.sites)
    types = [kind for _, _, kind in layers.values()]
    bits = {module: 8 * size / weight.size for module, (weight, size, _) in layers.items()}
    return ((module, weight, 0.0) for module, (weight, _, _) in layers.items()), {
        "bits": 8 * sum(size for _, size, _ in layers.values()) / moved.numbers,
        "dense_layers": len(layers),
        "widths": {kind: types.count(kind) for kind in sorted(set(types))},
        "predicted": None,
        "layers": {module: [moved.sites[module].full_rank, bits[module], None] for module in layers},
    }


def quantised_by_bitsandbytes(moved: OffGrid, folder: Path, name: str) -> Made:
    """The layers in NF4, blocks of NF4_BLOCK numbers with a scale of 32 bits."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def layers() -> Iterator[tuple[str, np.ndarray, float]]:
        for module in moved.sites:
            layer = moved.layer(module)
            packed = quantize_4bit(torch.from_numpy(layer.W).float(), blocksize=NF4_BLOCK, quant_type="nf4")
            weight = dequantize_4bit(*packed).numpy()
            yield module, weight, layer.metric.loss(weight - layer.W)

    bits = 4 + 32 / NF4_BLOCK
    return layers(), {
        "bits": bits,
        "dense_layers": len(moved.sites),
        "widths": {"nf4": len(moved.sites)},
        "predicted": None,
        "layers": {module: [site.full_rank, bits, None] for module, site in moved.sites.items()},
    }


TOOLS = {"llama.cpp": quantised_by_llama_cpp, "bitsandbytes": quantised_by_bitsandbytes}


@torch.inference_mode()
def perplexity(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    losses = []
    for ids in sequences.split(4):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item() * len(ids))
    return math.exp(sum(losses) / len(sequences))


def divergence(moved: OffGrid, model: PreTrainedModel, answers: Iterable[Conversation]) -> float:
    """KL(dense ‖ row) a token over the dense model's own answers."""
    total = tokens = 0.0
    for row in answers:
        found = compare_tokens(moved.model, model, torch.tensor(row.prompt + row.answer)[None])
        total += float(found["divergence"][0, len(row.prompt) - 1 :].double().sum())
        tokens += len(row.answer)
    return total / tokens


def print_layers(moved: OffGrid, names: list[str]) -> None:
    """Losses of single layers in parts of the loss of dropping them: cut to two thirds of the rank, rounded, and both."""
    print(
        f"{'layer':36} {'storage':10} {'rank':>5} {'bits':>5} {'cut':>9} {'nearest':>9} {'feedback':>9} {'predicted':>9}"
    )
    for name in names:
        layer, site = moved.layer(name), moved.sites[name]
        whole, sigma = layer.metric.loss(layer.W), moved.sigma[name]
        units = rounding_units(layer.W, layer.left, layer.right, sigma, layer.metric.inputs, layer.metric.outputs)
        for storage in ("dense", "factors", "pivoted"):
            rank = site.full_rank if storage == "dense" else site.full_rank * 2 // 3 // GROUP * GROUP
            cut = float(np.square(sigma[rank:]).sum())
            for bits in (8, 4):
                losses = []
                for nearest in (True, False):
                    weight = kept_weight(layer, Option(rank, storage, bits, 0, 0.0), nearest)
                    losses.append(layer.metric.loss(weight - layer.W) / whole)
                ranks = units.of_plain(bits) if storage == "factors" else units.of_pivoted(bits)
                predicted = (cut + (units.of_dense(bits) if storage == "dense" else ranks[rank])) / whole
                figures = " ".join(f"{value:9.2e}" for value in (cut / whole, *losses, predicted))
                print(f"{name:36} {storage:10} {rank:5} {bits:5} {figures}", flush=True)


def second_text(path: Path, workspace: Workspace, length: int) -> torch.Tensor:
    """Sequences spread over a text file, each with the token that the tokenizer begins a text with."""
    tokenizer = AutoTokenizer.from_pretrained(workspace.model)
    ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    starts = np.linspace(len(begin), len(ids) - length, TEXT, dtype=int)
    return torch.tensor([(begin + ids[start : start + length])[:length] for start in starts])


DEADLINE = [math.inf]


def yield_time() -> None:
    """Stop where the time is over; what has been made is kept."""
    if time.monotonic() > DEADLINE[0]:
        raise SystemExit("time is over: call again to go on")


def read_row(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def print_table(folder: Path) -> None:
    rows = {name: read_row(folder, name) for name in ROWS if (folder / f"{name}.json").exists()}
    names = [key for key in next(iter(rows.values())) if key.startswith("perplexity")]
    print(
        f"{'row':20} {'bits':>6} {'dense':>6} "
        + " ".join(f"{name:>18}" for name in names)
        + f" {'KL':>8} {'predicted':>10} {'measured':>10}"
    )
    for name, row in rows.items():
        texts = " ".join(f"{row[text]:18.2f}" for text in names)
        print(
            f"{name:20} {row['bits']:6.2f} {row['dense_layers']:6} {texts} {row.get('own_answers_kl', math.nan):8.4f} {row['predicted'] or math.nan:10.3g} {row['measured'] or math.nan:10.3g}"
        )
    report(rows, names)


def report(rows: dict[str, dict], names: list[str]) -> None:
    """The issue's figures, as far as their rows have been measured."""
    for bits, limit in ((8, 1.01), (4, 1.15)):
        for storage, own in (("pivoted", "rank-9.6"), ("plain", "plain-9.6")):
            pair = rows.get(f"{own}-{bits}"), rows.get(own)
            if all(pair):
                value = max(pair[0][name] / pair[1][name] for name in names)
                figure = f"perplexity of {storage} factors in {bits} bits over 16 bits, ratio 0.4"
                print(at_most(figure, value, "ratio", limit))
    for name in ("rank-9.6-8", "rank-5.1", "rank-9.6-4", "rank-2.7"):
        if name in rows and "rank-9.6" in rows:
            print(
                f"{name}: {added_at_equal_ranks(rows[name], rows['rank-9.6']):.1%} more loss than 16 bits, over layers cut to equal ranks"
            )
    foreseen = {name: row for name, row in rows.items() if not ROWS[name].nearest and row["predicted"]}
    allocations = [(row["predicted"], row["measured"]) for row in foreseen.values()]
    layers = [(plan[2], plan[3]) for row in foreseen.values() for plan in row["layers"].values() if min(plan[2:]) > 0]
    for what, pairs in (("allocations", allocations), ("layers of all rows", layers)):
        if len(pairs) > 2:
            ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)
            value = float(np.corrcoef(ranks.T)[0, 1])
            print(at_least(f"rank correlation of predicted and measured loss, {what}", value, "", 0.95))


def added_at_equal_ranks(row: dict, whole: dict) -> float:
    """What rounding adds to the loss of those layers that both rows cut to the same rank, as a share of it."""
    pairs = [(row["layers"][name], other) for name, other in whole["layers"].items()]
    losses = [(own[-1], other[-1]) for own, other in pairs if own[0] == other[0] and other[-1] > 0]
    return sum(own for own, _ in losses) / sum(other for _, other in losses) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--folder", type=Path, required=True, help="what is kept from call to call")
    parser.add_argument("--second", type=Path, default=None, help="a text of another kind")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--layers", default=None, help="print the losses of these layers alone")
    options = parser.parse_args()
    DEADLINE[0] = time.monotonic() + 60 * options.minutes
    workspace = Workspace(options.project.resolve())
    if options.layers:
        return print_layers(off_grid(workspace), options.layers.split(","))
    if not options.table:
        moved = off_grid(workspace)
        sequences = read_sequences(workspace.table("evaluation"), moved.model.config.vocab_size)[:TEXT]
        texts = {"first": sequences}
        if options.second:
            texts["second"] = second_text(options.second, workspace, sequences.shape[1])
        for name in options.rows.split(","):
            path = options.folder / f"{name}.json"
            if not path.exists():
                found = measure(moved, options.folder, name, texts)
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
                print(name, {key: value for key, value in found.items() if key != "layers"}, flush=True)
    print_table(options.folder)


if __name__ == "__main__":
    main()
