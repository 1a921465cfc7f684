"""Tables of the terminal: as wide as it is, eighty columns where that is not known; long cells go on in the next line."""

import shutil
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str | Text]], right: Sequence[str] = (), title: str | None = None
) -> None:
    """Print rows of text as it is, not as markup; columns in `right` are aligned there."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console(width=shutil.get_terminal_size((80, 24)).columns, highlight=False).print(table)
