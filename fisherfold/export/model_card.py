"""The README.md of a checkpoint: what it is, how to load it, what it was made of and how. No dates: the same run, the same card."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fisherfold.export.architecture import DenseArchitecture
from fisherfold.run.params import FactorizeParams
from fisherfold.run.workspace import Workspace

LICENCE_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.\-]*")
LOW_RANK = """\
# {name}, low-rank

The language model {origin}
with its linear layers replaced by low-rank products, compressed by Fisherfold. `config.json` lists the layers;
`modeling_fisherfold.py`, in this folder, is all the code it needs besides torch and transformers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder", trust_remote_code=True)
```

`trust_remote_code=True` runs the file above; without it transformers refuses to load the folder. Adapters and quantizers
find ordinary `nn.Linear` layers inside (PEFT: `target_modules="all-linear"`).{dense}

| | dense | this model | kept |
|---|---|---|---|
{sizes}

Counted from the saved tensors, index arrays included. Removed share of the targeted layers: {removed:.4f}.

## How it was made
{settings}
"""
BESIDE = "The same model, multiplied out to the dense architecture, as large and as slow as the dense one, lies beside this folder:"
HINTS = {
    "dense_export": "the folder `dense`: an ordinary checkpoint for tools that load, convert or quantize dense models",
    "gguf_export": "the file `model.gguf`: for llama.cpp and the tools built on it",
}
"""What lies beside the checkpoint, by parameter of stage factorize, and what it is for."""
MULTIPLIED_OUT = """\
# {name}, low-rank, multiplied out

The language model {origin}
with its linear layers replaced by low-rank products (Fisherfold), multiplied out: an ordinary {architecture} checkpoint that any
tool loads, converts or quantizes, as large and as slow as the dense model. The small form is the folder `model` beside this one.

## How it was made
{settings}
"""
SIZES = {
    "targeted layers, numbers": "targeted_parameters",
    "whole model, numbers": "model_parameters",
    "whole model, bytes": "model_bytes",
}


def compressed_card(
    workspace: Workspace, architecture: DenseArchitecture, counts: dict[str, Any], params: FactorizeParams
) -> str:
    """The card of the checkpoint with low-rank layers; `counts` is the content of factorize.json."""
    beside = [f"- {hint}" for name, hint in HINTS.items() if getattr(params, name)]
    sizes = [(label, counts[f"{key}_dense"], counts[f"{key}_compressed"]) for label, key in SIZES.items()]
    rows = [f"| {label} | {dense:,} | {kept:,} | {kept / dense:.4f} |" for label, dense, kept in sizes]
    _, dense, kept = sizes[0]
    return _front_matter(workspace) + LOW_RANK.format(
        **_origin(workspace),
        dense="\n\n".join(["", BESIDE, "\n".join(beside)]) if beside else "",
        sizes="\n".join(rows),
        removed=1 - kept / dense,
        settings=_settings(workspace, counts),
    )


def dense_card(workspace: Workspace, architecture: DenseArchitecture, counts: dict[str, Any]) -> str:
    """The card of the dense export."""
    text = MULTIPLIED_OUT.format(
        **_origin(workspace), architecture=architecture.model_class, settings=_settings(workspace, counts)
    )
    return _front_matter(workspace) + text


def _front_matter(workspace: Workspace) -> str:
    """The YAML block that the hub reads."""
    facts = _facts(workspace)
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [fisherfold, low-rank]"]
    if "huggingface.co/" in facts["origin"]:
        lines.append(f"base_model: {facts['origin'].partition('huggingface.co/')[2].rstrip(')')}")
    elif facts["origin"] == "hub":
        lines.append(f"base_model: {facts['name']}")
    licence = facts["licence"]
    if licence and LICENCE_IDENTIFIER.fullmatch(licence.lower()):
        lines.append(f"license: {licence.lower()}")
    elif licence:
        lines += ["license: other", f"license_name: {json.dumps(licence)}"]
    return "\n".join(["---", *lines, "---", ""])


def _origin(workspace: Workspace) -> dict[str, str]:
    """`name` and `origin` of the dense model for a sentence; of a local model no more than the folder's own name."""
    facts = _facts(workspace)
    name = Path(facts["name"]).name
    licence = f"licence: {facts['licence'] or 'not stated, see the dense model'}"
    where = {"hub": f"https://huggingface.co/{facts['name']}", "local": "a local folder"}.get(
        facts["origin"], facts["origin"]
    )
    return {"name": name, "origin": f"{name} from {where}; {licence}; digest `{facts['digest'][:16]}`,"}


def _facts(workspace: Workspace) -> dict[str, Any]:
    return json.loads((workspace.out("prepare") / "prepare.json").read_text(encoding="utf-8"))["model"]


def _settings(workspace: Workspace, counts: dict[str, Any]) -> str:
    """The parameters that determine the result, one a line."""
    subspace = json.loads((workspace.out("subspace") / "subspace.json").read_text(encoding="utf-8"))
    budget = json.loads((workspace.out("ranks") / "budget.json").read_text(encoding="utf-8"))
    ranks = pq.read_table(workspace.out("ranks") / "ranks.parquet").to_pylist()
    settings = {f"subspace.{key}": value for key, value in sorted(subspace.items()) if key != "dense"} | {
        "ranks.ratio": budget["ratio"],
        "ranks.budget": budget.get("unit", "parameters"),
        "ranks.allocator": ranks[0]["allocator"],
        "factorize.dtype": counts["dtype"],
    }
    kinds = Counter(record["kind"] for record in counts["layers"].values()) | Counter(
        dense=len(ranks) - len(counts["layers"])
    )
    layers = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()) if number)
    return "\n".join([*(f"- {key}: {value}" for key, value in settings.items()), f"- layers: {layers}"])
