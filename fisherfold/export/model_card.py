"""The README.md of a checkpoint: what it is, how to load it, what it was made of and how. No dates: the same run, the same card.

Stage factorize writes it before anything is measured; `card_results` adds what stage evaluate found.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fisherfold.allocators.cost import DENSE
from fisherfold.allocators.format_price import price_line
from fisherfold.export.architecture import DenseArchitecture
from fisherfold.export.card_templates import LOW_RANK, MULTIPLIED_OUT
from fisherfold.page.references import REFERENCES
from fisherfold.run.params import FactorizeParams, HealParams, RefineParams
from fisherfold.run.targets import TARGETS
from fisherfold.run.workspace import Workspace

LICENCE_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-]*")
HUB = "huggingface.co/"
HINTS = {
    "dense_export": "the folder `dense`: an ordinary checkpoint for tools that load, convert or quantize dense models",
    "gguf_export": "the file `model.gguf`: for llama.cpp and the tools built on it",
}
"""What lies beside the checkpoint, by parameter of stage factorize, and what it is for."""
SIZES = {
    "targeted layers, numbers": "targeted_parameters",
    "whole model, numbers": "model_parameters",
    "a token meets, on average": "active_parameters",
    "whole model, bytes": "model_bytes",
}
SETTINGS = {
    "svd": (),
    "asvd": ("asvd_alpha", "input_damping"),
    "fwsvd": ("input_damping",),
    "svd_llm": ("input_damping",),
    "kfac": ("input_damping", "output_damping"),
    "gfwsvd": ("input_damping", "output_damping"),
    "fasc": ("fasc", "input_damping", "output_damping"),
}
"""Parameters of stage subspace that a metric reads; of one that is not named here, all."""
NOT_SETTINGS = ("dense", "few_tokens", "methods", "shared", "metric", "threads")
USES = {"calibration": "calibration", "tuning": "choices by trial", "training": "training", "evaluation": "evaluation"}
WRITTEN = "self-written"


def compressed_card(
    workspace: Workspace, architecture: DenseArchitecture, counts: dict[str, Any], params: FactorizeParams
) -> str:
    """The card of the checkpoint with low-rank layers; `counts` is the content of factorize.json."""
    facts = _facts(workspace)
    sizes = [
        {"label": label, "dense": counts[f"{key}_dense"], "kept": counts[f"{key}_compressed"]}
        for label, key in SIZES.items()
        if f"{key}_dense" in counts
    ]
    return LOW_RANK.render(
        **_shared_parts(workspace, facts, counts, params),
        beside=[hint for name, hint in HINTS.items() if getattr(params, name)],
        chat=_has_chat_template(workspace.model),
        serve=_serving_command(params),
        target_costs=list(_target_costs(workspace, params)),
        length=facts.get("data", {}).get("sequence_length", "a few hundred"),
        sizes=sizes,
        removed=1 - sizes[0]["kept"] / sizes[0]["dense"],
    )


def _serving_command(params: FactorizeParams) -> str:
    """What starts the engine that the checkpoint was made for, typed in the checkpoint's folder."""
    target = TARGETS[params.target]
    return target.serve("." if target.serves == "model" else f"../{target.serves}")


def _target_costs(workspace: Workspace, params: FactorizeParams) -> Iterator[str]:
    """What is given up for the engine, in words."""
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text(encoding="utf-8"))
    if "format" in budget:
        yield price_line(**budget["format"])
    if TARGETS[params.target].costs:
        yield TARGETS[params.target].costs


def dense_card(
    workspace: Workspace, architecture: DenseArchitecture, counts: dict[str, Any], params: FactorizeParams
) -> str:
    """The card of the dense export."""
    parts = _shared_parts(workspace, _facts(workspace), counts, params)
    return MULTIPLIED_OUT.render(**parts, architecture=architecture.model_class)


def _facts(workspace: Workspace) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((workspace.out("prepare") / "prepare.json").read_text(encoding="utf-8"))
    return facts


def _shared_parts(
    workspace: Workspace, facts: dict[str, Any], counts: dict[str, Any], params: FactorizeParams
) -> dict[str, Any]:
    """What both cards say."""
    ranks = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    settings = _settings(workspace, ranks, counts) | _training(params) | {"layers": _kinds(ranks, counts)}
    used = [settings["subspace.metric"], settings["ranks.allocator"], *sorted({row["storage"] for row in ranks})]
    papers = dict.fromkeys(paper for method in used for paper in REFERENCES.get(method, ()))
    return {"model": _model(facts["model"]), "settings": settings, "data": list(_data(facts)), "papers": list(papers)}


def _model(facts: dict[str, Any]) -> dict[str, Any]:
    """The dense model; of a local one no more than the folder's own name."""
    origin, name = facts["origin"], Path(facts["name"]).name
    place = {"hub": f"https://{HUB}{facts['name']}", "local": "a local folder"}.get(origin, origin)
    return {
        "name": name,
        "place": place,
        "base": facts["name"] if origin == "hub" else origin.partition(HUB)[2].rstrip(")"),
        "licence": facts["licence"] or "not stated, see the dense model",
        "licence_lines": _licence_lines(facts["licence"]),
        "digest": facts["digest"][:16],
    }


def _licence_lines(licence: str | None) -> list[str]:
    """As the hub's front matter wants it."""
    if not licence:
        return []
    if LICENCE_IDENTIFIER.fullmatch(licence.lower()):
        return [f"license: {licence.lower()}"]
    return ["license: other", f"license_name: {json.dumps(licence)}"]


def _has_chat_template(model: Path) -> bool:
    settings = model / "tokenizer_config.json"
    named = settings.exists() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return named or (model / "chat_template.jinja").exists()


def _data(facts: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Rows of the table of data: every source of every split, then the questions."""
    known = {source["name"]: source for key, source in facts.items() if key.startswith("corpus")}
    prompts = facts.get("prompts")
    for split, use in USES.items():
        sources = facts.get("data", {}).get("splits", {}).get(split, {}).get("sources", {})
        for name, sequences in sources.items():
            yield {"use": use, "amount": f"{sequences} sequences", **_source(name, known, prompts)}
    if questions := facts.get("questions"):
        licence = questions["licence"] or "not stated"
        amount = f"{facts['data']['question_count']} questions"
        yield {"use": "questions", "source": _public_name(questions), "licence": licence, "amount": amount}


def _source(name: str, known: dict[str, Any], prompts: dict[str, Any] | None) -> dict[str, str]:
    if name == WRITTEN and prompts:
        return {
            "source": f"written by the dense model, in answer to the prompts {_public_name(prompts)}",
            "licence": prompts["licence"] or "not stated",
        }
    found = known.get(name)
    return (
        {"source": _public_name(found), "licence": found["licence"] or "not stated"}
        if found
        else {"source": name, "licence": "not stated"}
    )


def _public_name(source: dict[str, Any]) -> str:
    """Name and place; of a local file no more than its own name."""
    if source["origin"] == "local":
        return Path(source["name"]).name
    return source["name"] if source["origin"] == "hub" else f"{source['name']}, {source['origin']}"


def _settings(workspace: Workspace, ranks: list[dict[str, Any]], counts: dict[str, Any]) -> dict[str, Any]:
    """The parameters that were used, and what they gave."""
    subspace = json.loads((workspace.out("subspace") / "subspace.json").read_text(encoding="utf-8"))
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text(encoding="utf-8"))
    keys = SETTINGS.get(subspace["metric"], tuple(key for key in sorted(subspace) if key not in NOT_SETTINGS))
    shared = {"subspace.share_inputs": True} if subspace.get("shared") else {}
    return {
        "subspace.metric": subspace["metric"],
        **{f"subspace.{key}": subspace[key] for key in keys if key in subspace},
        **shared,
        "ranks.ratio": budget["ratio"],
        "ranks.budget": budget.get("unit", "parameters"),
        "ranks.allocator": ranks[0]["allocator"],
        "factorize.dtype": counts["dtype"],
    }


def _training(params: FactorizeParams) -> dict[str, Any]:
    """What was done to the factors after the cut."""
    trained: dict[str, RefineParams | HealParams] = {"refine": params.refine, "heal": params.heal}
    found = {
        f"factorize.{name}.{key}": getattr(block, key)
        for name, block in trained.items()
        for key in ("passes", "rate")
        if block.passes
    }
    rounded = {"factorize.bits": params.bits, "factorize.head_bits": params.head_bits}
    return found | {name: bits for name, bits in rounded.items() if bits}


def _kinds(ranks: list[dict[str, Any]], counts: dict[str, Any]) -> str:
    """How many layers there are of each kind, and of how many bits where these were chosen layer by layer."""
    kinds = Counter(
        counts["layers"].get(row["module"], {"kind": DENSE})["kind"]
        + (f" in {bits} bits" if (bits := row.get("bits")) else "")
        for row in ranks
    )
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
