"""What a folder of lm-eval task files may run: nothing, unless `evaluate.trust_task_code` says so.

Task files name Python functions (`!function`) and metrics that lm-eval would fetch and execute; both are refused before anything
is loaded, but for the functions of this package. Their templates are programs too: they render in Jinja2's sandbox, always.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import lm_eval.utils
import yaml
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api import metrics  # noqa: F401  fills the registry
from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks._index import Entry

from fisherfold.run.errors import ParameterError

FUNCTION = "!function"
OWN_FUNCTIONS = ("fisherfold.evaluation.tasks.four_choice_csv",)
CURE = "If you trust the folder, set evaluate.trust_task_code to true: then all of it may run."


def sandbox_templates() -> None:
    """Have lm-eval render templates where they cannot reach Python's own objects."""
    plain = lm_eval.utils.env
    if not isinstance(plain, SandboxedEnvironment):
        lm_eval.utils.env = SandboxedEnvironment(
            loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
        )
        lm_eval.utils.env.filters.update(plain.filters)


def require_no_code(name: str, index: Mapping[str, Entry]) -> None:
    """Refuse a task or group whose files, or files that these include, would run code that is not of this package.

    Raises:
        ParameterError: they would; the message names the file, the line and what it asks for.
    """
    for path in sorted(_files_of(name, index, set())):
        for node in _nodes(yaml.compose(path.read_text(encoding="utf-8"))):
            if what := _code_in(node, path):
                raise ParameterError(
                    f"evaluate.tasks: {name!r} would run code: {path}, line {node.start_mark.line + 1}: {what}. {CURE}"
                )


def _files_of(name: str, index: Mapping[str, Entry], seen: set[str]) -> set[Path]:
    """Task files of a task, group or tag, of its members, and the files that these include."""
    entry = index.get(name)
    if entry is None or name in seen:
        return set()
    seen.add(name)
    members = (entry.cfg or {}).get("task")
    names = [*entry.tags] if entry.yaml_path is None else _names(members)
    files = set().union(*(_files_of(each, index, seen) for each in names))
    return files | (_with_includes(entry.yaml_path, set()) if entry.yaml_path else set())


def _names(members: object) -> list[str]:
    """Names of tasks and groups in a group's list, which may hold further lists."""
    if isinstance(members, str):
        return [members]
    if isinstance(members, Mapping):
        return [name for key in ("task", "group") for name in _names(members.get(key))]
    return [name for member in members for name in _names(member)] if isinstance(members, list) else []


def _with_includes(path: Path, seen: set[Path]) -> set[Path]:
    path = path.expanduser().resolve()
    if path in seen or not path.is_file():
        return seen
    seen.add(path)
    for key, value in _entries(yaml.compose(path.read_text(encoding="utf-8"))):
        if key == "include":
            for node in _nodes(value):
                if isinstance(node, yaml.ScalarNode):
                    _with_includes(path.parent / node.value, seen)
    return seen


def _entries(node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    return [(key.value, value) for key, value in node.value] if isinstance(node, yaml.MappingNode) else []


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """A node of a YAML document and all below it."""
    if node is None:
        return
    yield node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _nodes(key)
            yield from _nodes(value)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _nodes(child)


def _code_in(node: yaml.Node, path: Path) -> str | None:
    """What a node would run, in words."""
    if node.tag == FUNCTION:
        module = path.parent / f"{node.value.rpartition('.')[0].replace('.', '/')}.py"  # lm-eval looks here first
        return None if node.value in OWN_FUNCTIONS and not module.exists() else f"{FUNCTION} {node.value}"
    entries = dict(_entries(node))
    metric = entries.get("metric")
    if (
        metric is not None
        and metric.tag != FUNCTION
        and (metric.value not in METRIC_REGISTRY or "hf_evaluate" in entries)
    ):
        return f"metric {metric.value!r} is none of lm-eval's own, so it would be fetched and run"
    return None
