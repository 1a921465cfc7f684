"""How to do the run again: the command that sets every parameter which is not as shipped."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from fisherfold.page.page import element, section
from fisherfold.run.params import Params

LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("artifacts/factorize/model", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("artifacts/factorize/model")
"""


def reproduce_view(params: Mapping[str, Mapping[str, Any]]) -> Markup:
    """The section with the command.

    Args:
        params: the block that each stage ran with.
    """
    settings = changed_settings(params)
    again = " \\\n".join(["fisherfold run", *(f"  --set {shlex.quote(setting)}" for setting in settings)])
    said = "Every parameter that is not as shipped is set." if settings else "All parameters are as shipped."
    return section(
        "Do it again",
        element("p", f"The same parameters give the same bits. {said}"),
        element("pre", element("code", again)),
        element("p", "Or through DVC alone, in the project's folder, which also compares runs:"),
        element("pre", element("code", "dvc repro\ndvc metrics diff\ndvc plots diff")),
        element(
            "p", "The compressed model carries its own code; no installation of this project is needed to load it:"
        ),
        element("pre", element("code", LOADING)),
    )


def changed_settings(params: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """``stage.key=value`` of every parameter that differs from the shipped one, values in the form that ``--set`` reads."""
    shipped = Params().model_dump(mode="json")  # as params.yaml is shipped: tests/fisherfold/run/test_params.py
    return [setting for stage, block in params.items() for setting in _changed(stage, block, shipped.get(stage, {}))]


def _changed(name: str, found: Mapping[str, Any], shipped: Mapping[str, Any]) -> Iterator[str]:
    for key, value in found.items():
        known = shipped.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping) and known:
            yield from _changed(f"{name}.{key}", value, known)
        elif value != known:
            yield f"{name}.{key}={json.dumps(value, ensure_ascii=False)}"
