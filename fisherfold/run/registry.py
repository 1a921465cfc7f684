"""Methods by name: a registry turns a parameter's value into the function that does it."""

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fisherfold.run.errors import ParameterError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries of one kind, by name; `parameter` is the key of params.yaml that chooses among them."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self._entries: dict[str, Entry] = {}

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator that enters a function or class under `name`."""

        def enter(entry: Entry) -> Entry:
            self._entries[name] = entry
            return entry

        return enter

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def lookup(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            ParameterError: there is none; the message gives the nearest name and all of them.
        """
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ParameterError(
            f"{self.parameter} = {name!r} is unknown.{hint} Valid are {', '.join(sorted(self._entries))}."
        )
