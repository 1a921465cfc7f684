"""Overrides of parameters on the command line, written into params.yaml as ``dvc exp run -S`` does, but for the named lines alone.

They stay there: what params.yaml says is what artifacts/ holds, for `dvc repro`, `status` and the next run too.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel
from ruamel.yaml.error import YAMLError

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import Params, check_params, read_document
from fisherfold.run.presets import PRESETS, Values
from fisherfold.run.targets import TARGETS
from fisherfold.run.yaml_text import parse_yaml
from flows.methods import check_methods
from flows.yaml_edit import flow_text, parsed, set_values, with_value


def override_params(path: Path, assignments: Sequence[str]) -> list[str]:
    """Set ``block.key=value`` in params.yaml; the file changes only if all are valid. Returns what changed, one text a key.

    Values are YAML: ``true``, ``0.4``, ``[a, b]``, ``null``. Nested keys reach into a block (``ranks.fermigrad.steps=80``) and into a
    parameter that is a mapping (``ranks.fixed.model.layers.0.mlp.up_proj=128``); a mapping given to a block leaves what it does not name.

    Raises:
        ParameterError: an assignment is not of this form, or its key or value is not valid.
    """
    before = _read(path)
    text, _ = overridden(path, assignments)
    if text != before:
        target = path.resolve()
        partial = target.with_name(f"{target.name}.partial")
        partial.write_text(text, encoding="utf-8", newline="")
        shutil.copymode(target, partial)
        os.replace(partial, target)
    return list(_differences(_document(before), _document(text)))


def changes(path: Path, assignments: Sequence[str]) -> list[str]:
    """What assignments would change of params.yaml, one text a key; see `override_params`."""
    return list(_differences(_document(_read(path)), _document(assigned(path, assignments)[0])))


def overridden(path: Path, assignments: Sequence[str]) -> tuple[str, Params]:
    """The text of params.yaml with assignments, and the parameters that it gives, names of methods looked up; see `override_params`."""
    text, params = assigned(path, assignments)
    check_methods(params)
    return text, params


def assigned(path: Path, assignments: Sequence[str]) -> tuple[str, Params]:
    """The same without a look at the methods, which costs seconds of imports."""
    read_document(path)
    text = _read(path)
    changes = [(assignment, parse(assignment)) for assignment in assignments]
    try:
        text = set_values(text, [change for _, each in changes for change in each])
    except ValueError:
        for assignment, each in changes:  # which one?
            try:
                text = set_values(text, each)
            except ValueError as error:
                raise ParameterError(f"--set {assignment}: {path}: {error}. Change it by hand.") from None
    return text, check_params(_document(text), f"--set {' '.join(assignments)}" if assignments else str(path))


def given(assignments: Sequence[str]) -> Params:
    """The default parameters with assignments, for what runs outside a project; see `override_params`."""
    document: dict = {}
    for assignment in assignments:
        for keys, value in parse(assignment):
            document = with_value(document, keys, value)
    return check_params(document, f"--set {' '.join(assignments)}")


def parse(assignment: str) -> list[tuple[list[str], object]]:
    """The keys and values that an assignment sets: of a block, each by itself.

    Raises:
        ParameterError: it is not ``STAGE.KEY=VALUE``, or the value is not YAML.
    """
    name, equals, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ParameterError(f"--set {assignment}: {FORM}")
    try:
        value = parse_yaml(text)
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ParameterError(f"--set {assignment}: the value is not valid YAML ({reason}).") from None
    if bundle := BUNDLES.get(tuple(keys), {}).get(str(value)):
        return [(keys, value), *((list(path), each) for path, each in bundle.items())]
    found = list(_leaves(Params, keys, value))
    if any(len(keys) == 1 and _block(Params, keys[0]) for keys, _ in found):
        raise ParameterError(f"--set {assignment}: {FORM}")
    return found


BUNDLES: dict[tuple[str, ...], dict[str, Values]] = {
    ("preset",): PRESETS,
    ("factorize", "target"): {name: target.values for name, target in TARGETS.items()},
}
"""Parameters whose value names values of others, which are set with it."""
FORM = "expected STAGE.KEY=VALUE, for instance ranks.ratio=0.4."


def _leaves(block: type[BaseModel], keys: Sequence[str], value: object) -> Iterator[tuple[list[str], object]]:
    """`keys` below `block`, as far as they name blocks; then one parameter, and what is left names an entry of it."""
    first, *rest = keys
    inner = _block(block, first)
    if inner and (rest or (isinstance(value, dict) and value)):
        for named, each in [(rest, value)] if rest else [([str(key)], each) for key, each in value.items()]:
            yield from (([first, *below], leaf) for below, leaf in _leaves(inner, named, each))
    else:
        yield [first, ".".join(rest)] if rest else [first], value


def _block(block: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The class of a block's field, if that is a block of its own."""
    kind = block.model_fields[key].annotation if key in block.model_fields else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _differences(before: object, after: object, name: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in after:
            yield from _differences(before.get(key), after[key], f"{name}.{key}" if name else str(key))
    elif before != after:
        yield f"{name}: {flow_text(before)} → {flow_text(after)}"


def _read(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        return file.read()


def _document(text: str) -> dict:
    return parsed(text) or {}
