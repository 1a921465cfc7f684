"""Factorized experts against dropped ones, on a mixture that is made here.

    python benchmarks/experts.py --project FOLDER --made trained                                       # see trained_mixture.py
    python benchmarks/experts.py --project FOLDER --made split --model artifacts/prepare/model         # see made_mixture.py
    python benchmarks/experts.py --project FOLDER --made copies --model artifacts/prepare/model        # the same
    python benchmarks/experts.py --quick                                   # 40 steps of training: shows that it runs, and no more

Experts alone are compressed, all other layers stay dense. Dropped experts are those of least Fisher mass (`ranks.allocator: drop_experts`), as many
in every block. The factorized models store as many numbers as those leave: by one budget (fisher), with the same share of every matrix (uniform),
by one budget with a right factor that the experts of a block share (shared), and fisher after refinement (refined). Times are over the dense model's in the same run. FOLDER keeps the mixture, the
stages' outputs and the rows that are done, and the command goes on from them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import made_mixture
import torch
import trained_mixture
from figures import at_most
from transformers import AutoModelForCausalLM

import fisherfold.runtime  # noqa: F401  it loads compressed checkpoints
from fisherfold.network.layers import read_layers, write_layers
from fisherfold.run.params import Params
from fisherfold.run.tables import read_sequences
from fisherfold.run.workspace import Workspace
from stages import capture, evaluate, factorize, kronecker, prepare, ranks, subspace

TARGET = 0.8  # perplexity of the factorized model over that with experts dropped
PARAMS = {
    "prepare": {
        "model": "mixture",
        "corpus": "held-out.txt",
        "unseen": None,
        "prompts": str(trained_mixture.HERE / "data" / "prompts" / "everyday.txt"),
        "questions": None,
        "self_written": 0.0,
        "free_text": 0.0,
    },
    "capture": {"threads": 1, "knowledge_questions": 0, "tokens_per_sequence": 0},
    "kronecker": {"threads": 1, "diagnostics": "none", "dependence_draws": 0},
    "subspace": {"threads": 1},
    "ranks": {"threads": 1},
    "factorize": {"refine": {"passes": 0}, "heal": {"passes": 0}},
    "evaluate": {"threads": 1, "answer_tokens": 1},
}
FEW = {
    "prepare": {
        "held_out_prompts": 8,
        "answer_tokens": 48,
        "calibration_sequences": 24,
        "tuning_sequences": 8,
        "training_sequences": 0,
        "evaluation_sequences": 12,
    },
}
SIZES = {
    "trained": {
        "prepare": {
            "held_out_prompts": 0,
            "sequence_length": 128,
            "calibration_sequences": 128,
            "tuning_sequences": 16,
            "training_sequences": 0,
            "evaluation_sequences": 96,
        },
        "capture": {"batch_size": 8, "sequences_per_shard": 32},
    },
    "copies": FEW,
    "split": FEW,
}
MODELS = {
    "dropped": {"ranks": {"allocator": "drop_experts"}},
    "fisher": {},
    "uniform": {"ranks": {"allocator": "uniform"}},
    "shared": {"subspace": {"experts": {"shared": True}}},
    "refined": {"factorize": {"refine": {"passes": 2, "min_steps": 0, "threads": 1}}},
}
"""Parameters besides those above, by the name of a row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=None)
    parser.add_argument("--made", choices=SIZES, default="trained")
    parser.add_argument("--model", type=Path, default=None, help="folder of the Llama model that a mixture is made of")
    parser.add_argument("--models", default=",".join(MODELS), help="rows besides the dense one")
    parser.add_argument("--shares", default="0.2,0.4")
    parser.add_argument("--calibration", type=int, default=None, help="sequences for the statistics")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.made != "trained" and options.model is None:
        parser.error(f"--made {options.made} wants --model")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.project or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if options.made == "trained":
            trained_mixture.make(folder / "mixture", 40 if options.quick else trained_mixture.STEPS)
        else:
            made_mixture.make(options.model, folder / "mixture", options.made)
        write_held_out(folder / "held-out.txt")
        params = merged(PARAMS, SIZES[options.made])
        if options.calibration:
            params["prepare"]["calibration_sequences"] = options.calibration
        report(
            compare(Workspace(folder), params, options.models.split(","), list(map(float, options.shares.split(","))))
        )


def write_held_out(path: Path) -> None:
    """The articles that no mixture has seen, one a paragraph."""
    if not path.exists():
        _, texts = trained_mixture.articles()
        path.write_text("\n\n".join(" ".join(text.split()) for text in texts) + "\n", encoding="utf-8")


def merged(params: dict, more: dict) -> dict:
    """Blocks of parameters, the later ones over the earlier."""
    return {block: {**params.get(block, {}), **more.get(block, {})} for block in {*params, *more}}


def experts_alone(model: Path, found: Path) -> None:
    """Leave all layers but experts out of what stage prepare has found."""
    write_layers(found, [layer for layer in read_layers(found) if layer.stack])


def compare(workspace: Workspace, params: dict, names: list[str], shares: list[float]) -> list[dict]:
    """Rows of the table: the dense model, then each of `names` by share; those that are done are read."""
    first = Params.model_validate(params)
    prepare.run(workspace, first.prepare, experts_alone)
    for stage in (capture, kronecker):
        stage.run(workspace, getattr(first, stage.__name__.rpartition(".")[2]))
    place = workspace.root / "rows.json"
    rows = json.loads(place.read_text(encoding="utf-8")) if place.exists() else []
    experts = len({layer.expert for layer in read_layers(workspace.out("prepare"))})
    for name, share in product(names, shares):
        if any((row["model"], row["share"]) == (name, share) for row in rows):
            continue
        # Dropping takes whole experts: as many as the share is, rounded
        ratio = round(share * experts) / experts
        own = merged({"ranks": {"ratio": ratio - 1e-9}}, MODELS[name])
        rows += run_row(workspace, Params.model_validate(merged(params, own)), name, share, with_dense=not rows)
        place.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def run_row(workspace: Workspace, params: Params, name: str, share: float, with_dense: bool) -> Iterator[dict]:
    """The row of one compressed model, before it that of the dense one, if that is asked for."""
    for stage in (subspace, ranks, factorize, evaluate):
        stage.run(workspace, getattr(params, stage.__name__.rpartition(".")[2]))
    found = json.loads((workspace.out("evaluate") / "metrics.json").read_text(encoding="utf-8"))
    names = {"dense": "dense", "compressed": name}
    for which in names if with_dense else ("compressed",):
        yield {
            "model": names[which],
            "share": share if which == "compressed" else 0.0,
            "perplexity": found[which]["perplexity"],
            "own": found["compressed"]["own_answers_kl"] if which == "compressed" else 0.0,
            "kl": found["compressed"]["kl_to_dense"] if which == "compressed" else 0.0,
            "active": found["size"][f"active_parameters_{which}"],
            "parameters": found["size"][f"model_parameters_{which}"],
        } | (times(workspace) if which == "compressed" else {"prefill": 1.0, "token": 1.0})


@torch.no_grad()
def times(workspace: Workspace) -> dict[str, float]:
    """Of a prefill of 256 tokens and of a token after 64: the compressed model's time over the dense one's, which run in turn."""
    folders = workspace.model, workspace.out("factorize") / "model"
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
    text = read_sequences(workspace.table("evaluation"), len(models[0].get_input_embeddings().weight))
    text = text.flatten()[None, :256]
    caches = [model(input_ids=text[:, :64]).past_key_values for model in models]

    def token(which: int) -> None:
        models[which](input_ids=text[:, 64:65], past_key_values=caches[which])
        caches[which].crop(-1)

    prefill = [partial(model, input_ids=text, use_cache=False) for model in models]
    return {"prefill": slower(*prefill, times=5), "token": slower(partial(token, 0), partial(token, 1), times=41)}


def slower(dense: Callable[[], object], compressed: Callable[[], object], times: int) -> float:
    """The median of the second's times over that of the first's."""
    taken: tuple[list[float], ...] = ([], [])
    for _ in range(times):
        for own, run in zip(taken, (dense, compressed)):
            start = time.perf_counter()
            run()
            own.append(time.perf_counter() - start)
    one, other = (sorted(own)[times // 2] for own in taken)
    return other / one


def lines(rows: list[dict]) -> Iterator[str]:
    yield "| share | experts | perplexity | × dense | KL on text | KL on own answers | parameters | a token meets | prefill | token |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        own = "" if row["own"] is None else f"{row['own']:.3f}"
        yield (
            f"| {row['share']:.1f} | {row['model']} | {row['perplexity']:.2f} | {row['perplexity'] / rows[0]['perplexity']:.3f} | {row['kl']:.3f} "
            f"| {own} | {row['parameters'] / 1e6:.2f} M | {row['active'] / 1e6:.2f} M | {row['prefill']:.2f} | {row['token']:.2f} |"
        )


def report(rows: list[dict]) -> None:
    print(*lines(rows), sep="\n")
    found = {(row["model"], row["share"]): row["perplexity"] for row in rows}
    for other, target in (("dropped", TARGET), ("uniform", 1.0)):
        if ratios := [
            value / found[other, share]
            for (name, share), value in found.items()
            if name == "fisher" and (other, share) in found
        ]:
            figure = f"perplexity of experts with ranks by one budget over {other}, worst share"
            print(at_most(figure, max(ratios), "ratio", target))


if __name__ == "__main__":
    main()
