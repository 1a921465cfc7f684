"""A run of which every stage before `report` has published what the report reads, all of it made up."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.evaluation.greedy_answers import SAMPLES, summarise_samples
from fisherfold.evaluation.metrics import metrics
from fisherfold.evaluation.scores import mean_by_position, summarise_answers, summarise_losses
from fisherfold.evaluation.text import summarise_sources
from fisherfold.run.params import Params
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace

SIZE = {
    "targeted_parameters_dense": 1000,
    "targeted_parameters_compressed": 800,
    "model_parameters_dense": 2000,
    "model_parameters_compressed": 1800,
    "model_bytes_dense": 8_000_000,
    "model_bytes_compressed": 7_200_000,
}


def publish(workspace: Workspace, stage: str, **files: object) -> None:
    """Publish `files` (name with `__` for the dot) as the output of a stage."""
    with (
        Scratch(workspace, stage, getattr(Params(), stage), {"files": repr(files)}) as scratch,
        scratch.publish() as out,
    ):
        for name, content in files.items():
            path = out / name.replace("__", ".")
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))


def layer_rows(modules: list[str]) -> list[dict]:
    return [
        {"module": module, "n": 6, "m": 4, "rank": 1 + i % 4, "stored_parameters": 10 + i % 4, "dense_parameters": 24,
         "method": "kfac", "allocator": "fisher", "storage": "dense" if i == 3 else "pivoted"}
        for i, module in enumerate(modules)
    ]  # fmt: skip


def spectra_rows(modules: list[str]) -> pa.Table:
    sigma = [3.0, 1.0, 0.1, 0.0]
    rows = [{"module": module, "component": i, "sigma": value} for module in modules for i, value in enumerate(sigma)]
    return pa.Table.from_pylist(rows)


def said(prompt: str, dense: str, compressed: str, loops: bool = False) -> dict:
    """A row of answers.parquet."""
    return {
        "prompt": prompt, "dense": dense, "compressed": compressed, "dense_tokens": 9, "compressed_tokens": 9,
        "agreeing_tokens": 3, "dense_loops": False, "compressed_loops": loops,
    }  # fmt: skip


def evaluation(questions: bool = True, samples: list[dict] | None = None) -> dict[str, object]:
    """What stage `evaluate` publishes; `samples` are rows of answers.parquet."""
    table = pa.Table.from_pylist(samples or [], schema=SAMPLES)
    greedy = summarise_samples(table)
    own = greedy and {"tokens": 90, "mean": {"divergence": 0.1}, "standard_error": {"divergence": 0.02}}
    rng = np.random.default_rng(0)
    losses = {"dense": rng.random((4, 9)) + 3, "compressed": rng.random((4, 9)) + 3.2, "divergence": rng.random((4, 9))}
    text = summarise_losses(losses)
    answers = {
        model: [{"acc": i % step == 0, "acc_norm": 0} for i in range(20)]
        for model, step in (("dense", 2), ("compressed", 3))
    }
    knowledge = summarise_answers(answers if questions else {"dense": [], "compressed": []})
    sources = summarise_sources(losses, ["news", "leads", "leads", "<b>odd</b>"], {"leads"})
    rows = "\n".join(",".join(map(str, row)) for row in mean_by_position(losses, 5))
    return {
        "metrics__json": metrics(text, sources, knowledge, own, greedy, [], SIZE),
        "evaluation__json": {"params": {"dtype": "float32"}, "text": text, "knowledge": knowledge},
        "losses__csv": f"position,dense,compressed,divergence\n{rows}\n",
        "tasks__json": {},
        "answers__parquet": table,
    }


def finished(root, modules: list[str], evaluated: dict[str, object] | None = None) -> Workspace:
    """A workspace in which every stage before `report` has published what it must."""
    workspace = Workspace(root)
    publish(workspace, "prepare", prepare__json={"model": {"name": "tiny", "licence": "Apache-2.0"}})
    publish(
        workspace,
        "capture",
        capture__json={"sequences": 8, "tokens": 96, "gradients": "sketch", "sketch_rank": 4, "skipped": [5]},
    )
    kronecker = [{"module": module, "residual": 0.5, "scale": 1.0, "iterations": None} for module in modules]
    publish(
        workspace,
        "kronecker",
        kronecker__json={"estimator": "kfac"},
        diagnostics__parquet=pa.Table.from_pylist(kronecker),
    )
    conditions = [{"module": module, "input_condition": float("inf"), "output_condition": 10.0} for module in modules]
    publish(
        workspace,
        "subspace",
        subspace__json={"metric": "kfac"},
        spectra__parquet=spectra_rows(modules),
        diagnostics__parquet=pa.Table.from_pylist(conditions),
    )
    publish(workspace, "ranks", budget__json={"ratio": 0.2}, ranks__parquet=pa.Table.from_pylist(layer_rows(modules)))
    publish(workspace, "factorize", factorize__json={"size": SIZE})
    publish(workspace, "evaluate", **(evaluated or evaluation()))
    return workspace


LLAMA = [f"model.layers.{block}.{kind}" for block in range(3) for kind in ("self_attn.q_proj", "mlp.up_proj")]
