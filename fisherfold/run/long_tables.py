"""Long tables, several rows a module: which rows are a module's."""

from itertools import pairwise

import numpy as np
import pyarrow as pa


def module_rows(table: pa.Table) -> dict[str, slice]:
    """The rows of each module, by the column `module`; they lie together."""
    names = table["module"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1])[: len(names)])
    return {names[start]: slice(start, end) for start, end in pairwise([*starts, len(names)])}
