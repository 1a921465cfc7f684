"""Rows of modules in a table of several rows a module."""

import pyarrow as pa
import pytest

from fisherfold.run.long_tables import module_rows


@pytest.mark.parametrize(
    ("names", "rows"),
    [([], {}), (["a"], {"a": slice(0, 1)}), (["a", "a", "b"], {"a": slice(0, 2), "b": slice(2, 3)})],
)
def test_rows_of_each_module(names, rows):
    assert module_rows(pa.table({"module": pa.array(names, pa.string())})) == rows
