"""Overrides of parameters on the command line, written into params.yaml the way ``dvc exp run -S`` does."""

import os
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params, check_params, load_params
from flows.methods import check_methods


def override_params(path: Path, assignments: Sequence[str]) -> None:
    """Set ``block.key=value`` in params.yaml, keeping its comments; the file changes only if all are valid.

    Values are YAML: ``true``, ``0.4``, ``[a, b]``, ``null``.

    Raises:
        ParameterError: an assignment is not of this form, or its key or value is not valid.
    """
    text, _ = overridden(path, assignments)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def overridden(path: Path, assignments: Sequence[str]) -> tuple[str, Params]:
    """The text of params.yaml with assignments, and the parameters that it gives; see `override_params`."""
    load_params(path)
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 120
    document = yaml.load(path)
    for assignment in assignments:
        block, key, value = _parse(assignment)
        if document.get(block) is None:
            document[block] = {}
        document[block][key] = value
    text = _dump(yaml, document)
    params = check_params(YAML(typ="safe").load(text), f"--set {' '.join(assignments)}")
    check_methods(params)
    return text, params


def _parse(assignment: str) -> tuple[str, str, object]:
    name, equals, text = assignment.partition("=")
    block, dot, key = name.strip().partition(".")
    if not (equals and dot and block and key):
        raise ParameterError(f"--set {assignment}: expected STAGE.KEY=VALUE, for instance ranks.ratio=0.4.")
    try:
        return block, key, YAML(typ="safe").load(text)
    except YAMLError as error:
        raise ParameterError(f"--set {assignment}: the value is not valid YAML ({error}).") from None


def _dump(yaml: YAML, document: object) -> str:
    text = StringIO()
    yaml.dump(document, text)
    return text.getvalue()
