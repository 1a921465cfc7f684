"""One value of a YAML text changed where it stands, as a person would: every other character stays, comments and columns too."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from io import StringIO

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fisherfold.run.yaml_text import parse_yaml


def set_values(text: str, changes: Iterable[tuple[Sequence[str], object]]) -> str:
    """The text with each value under its nested keys; what is not there yet is added at the end of the mapping it belongs to.

    Raises:
        ValueError: the text gives something else with these changes, for instance since a value is an alias of another.
    """
    changed, wanted, names = text, parsed(text), []
    try:
        for keys, value in changes:
            changed, wanted = _set(changed, list(keys), value), with_value(wanted, keys, value)
            names.append(".".join(keys))
        faithful = parsed(changed) == wanted
    except YAMLError:
        faithful = False
    if not faithful:
        raise ValueError(f"{', '.join(names)} cannot be changed by itself where it stands")
    return changed


def _set(text: str, keys: list[str], value: object) -> str:
    root = YAML(typ="safe", pure=True).compose(text)
    return _changed(text, root, keys, value) if isinstance(root, MappingNode) else _line(text, keys, value)


def with_value(document: object, keys: Sequence[str], value: object) -> dict:
    """A parsed document with `value` under the nested `keys`; mappings on the way are made, and others replaced."""
    first, *rest = keys
    known = dict(document) if isinstance(document, Mapping) else {}
    return known | {first: with_value(known.get(first), rest, value) if rest else value}


def _changed(text: str, node: MappingNode, keys: list[str], value: object) -> str:
    first, *rest = keys
    for key, held in node.value:
        if key.value == first:
            inner = rest and isinstance(held, MappingNode)
            return _changed(text, held, rest, value) if inner else _replaced(text, key, held, _nested(rest, value))
    return _added(text, node, first, _nested(rest, value))


def _nested(keys: Sequence[str], value: object) -> object:
    return with_value(None, keys, value) if keys else value


def _replaced(text: str, key: Node, held: Node, value: object) -> str:
    """The value of `key` written over; a comment behind it keeps its column."""
    start, stop = held.start_mark.index, _end(text, held)
    written, colon = flow_text(value), _colon(text, key)
    if start == stop:
        start, stop, written = colon, colon, f" {written}"
    elif not _in_line(held):
        start, written = colon, f" {written}"
    rest = text[stop:]
    gap = len(rest) - len(rest.lstrip(" "))
    if rest[gap:].startswith("#"):
        moved = 0 if "\n" in text[start:stop] else stop - start - len(written)
        rest = " " * max(2, gap + moved) + rest[gap:]
    return text[:start] + written + rest


def _added(text: str, node: MappingNode, key: str, value: object) -> str:
    """A further key behind the last one of a mapping."""
    entry = f"{flow_text(key)}: {flow_text(value)}"
    if node.flow_style:
        at = node.end_mark.index - 1
        return text[:at] + (", " if node.value else "") + entry + text[at:]
    at = text.find("\n", _end(text, node))
    head, tail = (text[:at].removesuffix("\r"), text[at + 1 :]) if at >= 0 else (text, "")
    return f"{head}{_newline(text)}{' ' * node.start_mark.column}{entry}{_newline(text)}{tail}"


def _line(text: str, keys: Sequence[str], value: object) -> str:
    """A text that holds nothing yet, with a first line."""
    head = text if not text or text.endswith("\n") else text + _newline(text)
    return f"{head}{flow_text(keys[0])}: {flow_text(_nested(keys[1:], value))}{_newline(text)}"


def _in_line(node: Node) -> bool:
    """Whether a value begins behind its key, and not on lines of its own."""
    return node.style not in ("|", ">") if isinstance(node, ScalarNode) else bool(node.flow_style)


def _end(text: str, node: Node) -> int:
    """Where a node's own text ends; the parser counts the comments and empty lines behind a block as part of it."""
    if isinstance(node, MappingNode | SequenceNode) and not _in_line(node) and node.value:
        last = node.value[-1]
        return _entry_end(text, *last) if isinstance(last, tuple) else _end(text, last)
    if isinstance(node, ScalarNode) and not _in_line(node):
        return node.start_mark.index + len(text[node.start_mark.index : node.end_mark.index].rstrip())
    return node.end_mark.index


def _entry_end(text: str, key: Node, held: Node) -> int:
    """Where an entry ends; the parser sees nothing behind a colon on a later line."""
    return _end(text, held) if held.start_mark.index < held.end_mark.index else _colon(text, key)


def _colon(text: str, key: Node) -> int:
    """Just behind the colon of a key."""
    return text.index(":", key.end_mark.index) + 1


def flow_text(value: object) -> str:
    """A value as YAML in one line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width, yaml.allow_unicode = True, 2**31, True
    text = StringIO()
    yaml.dump(value, text)
    return text.getvalue().removesuffix("...\n").strip()


@lru_cache(maxsize=4)  # who changes a text has read it
def parsed(text: str) -> object:
    """A YAML text as plain values, which are shared: not to be changed."""
    return parse_yaml(text, pure=True)


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"
