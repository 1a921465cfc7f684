"""FASC against principal components: what a dense model loses when every layer's input is projected.

    python benchmarks/fasc.py                      # all objectives at half the dimension of every input
    python benchmarks/fasc.py --shares 0.25,0.5 --methods variance,gaussian:oblique
    python benchmarks/fasc.py --quick              # two objectives, the inputs of the first blocks, few sequences and questions

Needs a project that has run stages prepare and capture (`--project`), for `empirical` with capture.tokens_per_sequence. W_c x becomes W_c (P x)
in the dense model, P shared by all layers that read x: no spectrum, rank allocation or rounding comes in between.

rank: rank of P by the dimension of the input, summed over inputs. numbers: stored by dense ones, k (m + Σ n) an input with its right
factor counted once and k at most Σ n (down projections: fewer outputs than half their inputs); PivGa: k (m + Σ n − k).
"""

import argparse
from pathlib import Path
from time import perf_counter

import torch
from figures import figure
from torch import nn
from transformers import AutoTokenizer

from fisherfold.evaluation.harness import SharedContextModel, run_tasks
from fisherfold.evaluation.losses import compare_tokens
from fisherfold.evaluation.tasks import KNOWLEDGE, knowledge_task
from fisherfold.network.layers import LinearLayer, by_group, linear_modules
from fisherfold.network.models import load_model
from fisherfold.run.params import FascParams, load_params
from fisherfold.run.tables import read_sequences, read_table
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.input_gradients import stacked_weight
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.subspaces.fasc import OBJECTIVES, VARIANCE, GroupInput, group_input, optimal_projector, unreadable
from fisherfold.subspaces.metrics import MetricSources

METHODS = ",".join(["variance", *(f"{name}:{kind}" for name in OBJECTIVES for kind in ("orthonormal", "oblique"))])
MINIMISED = ("gaussian", "empirical")
QUICK = {"methods": "variance,gaussian:oblique", "groups": 8, "sequences": 4, "questions": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--shares", default="0.5", help="rank by dimension of the input, …")
    parser.add_argument("--methods", default=METHODS, help="variance or OBJECTIVE:PROJECTOR, …")
    parser.add_argument("--steps", type=int, default=None, help="of the descent, instead of params.yaml's")
    parser.add_argument("--groups", type=int, default=None, help="only so many inputs, from the first block on")
    parser.add_argument("--sequences", type=int, default=None)
    parser.add_argument("--questions", type=int, default=None)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    bench = Bench(options)
    print(
        f"{'method':24} {'share':>5} {'rank':>6} {'numbers':>8} {'PivGa':>7} {'perplexity':>11} {'KL':>8} {'knowledge':>10} {'s':>6}"
    )
    bench.print_row("dense", 1.0, {}, perf_counter())
    found = {}
    for share in map(float, options.shares.split(",")):
        for method in options.methods.split(","):
            start = perf_counter()
            found[method, share] = bench.print_row(method, share, bench.projectors(method, share), start)
    report(found)


class Bench:
    """A dense model whose inputs are projected, and what it is measured on."""

    def __init__(self, options: argparse.Namespace) -> None:
        workspace = Workspace(options.project.resolve())
        self.params = load_params(options.project / "params.yaml").subspace
        self.steps = self.params.fasc.steps if options.steps is None else options.steps
        self.sources = MetricSources(Statistics(workspace.out("capture")), workspace.out("kronecker"), self.params)
        self.folder = workspace.model
        self.dense, self.model = (load_model(workspace.model, torch.float32) for _ in range(2))
        groups = list(by_group(self.sources.statistics.layers).items())[: options.groups]
        self.groups = {name: group for name, group in groups if not unreadable(self.sources.statistics, group)}
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.ids = read_sequences(workspace.table("evaluation"), vocabulary)[: options.sequences]
        self.questions = read_table(workspace.table("questions"))[: options.questions]
        self.tokenizer = AutoTokenizer.from_pretrained(workspace.model)
        self.known: dict[str, GroupInput] = {}

    def projectors(self, method: str, share: float) -> dict[str, torch.Tensor]:
        """P of every input at a rank of `share` of its dimension."""
        name, _, kind = method.partition(":")
        objective = VARIANCE if name == "variance" else OBJECTIVES.lookup(name)
        params = FascParams(projector=kind or "orthonormal", steps=self.steps)
        return {
            group: self._row_space(members)
            if name in MINIMISED and self.rank(members, share) >= outputs(members)
            else optimal_projector(objective, self.input_of(group), params, self.rank(members, share)).float()
            for group, members in self.groups.items()
        }

    def _row_space(self, group: list[LinearLayer]) -> torch.Tensor:
        """The projector on what the weights read: loses nothing, so no objective finds a better one of that rank."""
        Q = torch.linalg.qr(stacked_weight(self.folder, group).T).Q
        return (Q @ Q.T).float()

    def input_of(self, group: str) -> GroupInput:
        """Found once for all methods."""
        if group not in self.known:
            self.known[group] = group_input(self.sources, self.folder, self.groups[group])
        return self.known[group]

    @staticmethod
    def rank(group: list[LinearLayer], share: float) -> int:
        return max(1, round(share * group[0].inputs))

    def print_row(self, method: str, share: float, projectors: dict[str, torch.Tensor], start: float) -> dict:
        self._project(projectors)
        perplexity, divergence = self._read_text()
        right = self._answer().double()
        row = {"perplexity": perplexity, "knowledge": right.mean().item(), "right": right, **self._sizes(share)}
        print(
            f"{method:24} {share:5.2f} {row['rank_share']:6.3f} {row['numbers']:8.3f} {row['pivoted']:7.3f} {perplexity:11.2f} "
            f"{divergence:8.4f} {row['knowledge']:10.3f} {perf_counter() - start:6.0f}",
            flush=True,
        )
        return row

    def _project(self, projectors: dict[str, torch.Tensor]) -> None:
        """W_c ← W_c P from the dense weights."""
        dense, modules = linear_modules(self.dense), linear_modules(self.model)
        for name, P in projectors.items():
            for layer in self.groups[name]:
                weight = dense[layer.name].weight
                projected = P.T.to(weight) @ weight if layer.transposed else weight @ P.to(weight)
                modules[layer.name].weight = nn.Parameter(projected, requires_grad=False)

    def _read_text(self) -> tuple[float, float]:
        """Perplexity, and KL(dense ‖ projected) per token."""
        parts = [compare_tokens(self.dense, self.model, ids) for ids in self.ids.split(4)]
        loss, divergence = (
            torch.cat([part[kind] for part in parts]).mean().item() for kind in ("compressed", "divergence")
        )
        return torch.tensor(loss).exp().item(), divergence

    def _answer(self) -> torch.Tensor:
        """Of each question, whether it is answered right: 0 or 1."""
        harness = SharedContextModel(self.model, self.tokenizer, 1024, 4)
        answers = run_tasks(harness, knowledge_task(self.questions), samples=True)["samples"][KNOWLEDGE]
        return torch.tensor([answer["acc"] for answer in sorted(answers, key=lambda answer: answer["doc_id"])])

    def _sizes(self, share: float) -> dict[str, float]:
        sizes = [(self.rank(group, share), group[0].inputs, outputs(group)) for group in self.groups.values()]
        dense = sum(m * n for _, m, n in sizes)
        return {
            "rank_share": sum(k for k, _, _ in sizes) / sum(m for _, m, _ in sizes),
            "numbers": sum(min(k, m, n) * (m + n) for k, m, n in sizes) / dense,
            "pivoted": sum(min(k, m, n) * (m + n - min(k, m, n)) for k, m, n in sizes) / dense,
        }


def outputs(group: list[LinearLayer]) -> int:
    """Σ n of the layers that read one input."""
    return sum(layer.outputs for layer in group)


def report(found: dict[tuple[str, float], dict]) -> None:
    """One line of JSON a share: the best of gaussian and empirical against principal components, on both figures."""
    for share in sorted({share for _, share in found}):
        rows = {method: row for (method, of), row in found.items() if of == share}
        rivals = {method: row for method, row in rows.items() if method.startswith(MINIMISED)}
        if "variance" not in rows or not rivals:
            continue
        base, name = rows["variance"], min(rivals, key=lambda method: rivals[method]["perplexity"])
        best = rivals[name]
        holds = best["perplexity"] < base["perplexity"] and best["knowledge"] > base["knowledge"]
        gain = best["right"] - base["right"]
        value = {
            "perplexity": [base["perplexity"], best["perplexity"]],
            "knowledge": [base["knowledge"], best["knowledge"]],
            "gain": [gain.mean().item(), gain.std().item() / len(gain) ** 0.5],
        }
        unit = "perplexity; share right; its gain and the standard error of that"
        what = f"principal components, then {name}, at {share:.0%} of every input's dimension"
        print(figure(what, value, unit, "both better", holds))


if __name__ == "__main__":
    main()
