"""Allocator `drop_experts`: whole experts go, all other layers stay dense (the baseline: REAP, arXiv 2510.13999, by our Fisher mass).

The mass of an expert is Σ σ² of the matrix that gives its output: to second order, twice what the loss rises by if the expert gives zero. Of
every mixture as many go, those of least mass; the router then chooses among those that are left, so what is written is an ordinary
model of the same architecture with fewer experts (see ``fisherfold.export.fewer_experts``).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisherfold.allocators.allocation import ALLOCATORS, Allocation
from fisherfold.linalg.knapsack import pick
from fisherfold.network.experts import experts_a_token
from fisherfold.network.layers import read_layers
from fisherfold.run.errors import ParameterError
from fisherfold.run.progress import announce

DROPPED = "dropped"  # the table of what goes: module, expert


@ALLOCATORS.register("drop_experts")
def drop_experts(allocation: Allocation) -> np.ndarray:
    """Full rank but for the experts that go, as few of every mixture as the budget allows. What that leaves of the budget stays unspent.

    An expert whose rank is settled (too few tokens under subspace.experts.few: dense, ranks.fixed, ranks.exclude) does not go.

    Raises:
        ParameterError: there are no experts; or so many would have to go that a token could not choose as many as it does.
    """
    assert allocation.workspace is not None
    mixtures = find_mixtures(allocation)
    if not mixtures or allocation.params.expert_classes < 2:
        raise ParameterError(
            "ranks.allocator = 'drop_experts' wants a mixture whose experts are layers of their own (prepare.experts: layers, "
            "subspace.experts.shared: false), and ranks.expert_classes of at least 2. Use ranks.allocator = 'fisher'."
        )
    from transformers import AutoConfig  # costs seconds, which other allocators do without

    config = AutoConfig.from_pretrained(allocation.workspace.model, local_files_only=True).get_text_config()
    groups, chosen = getattr(config, "n_group", None) or 1, experts_a_token(config)
    experts = Counter(layer.stack for layer in read_layers(allocation.workspace.out("subspace")) if layer.stack)
    most = min(*(min(experts.values()) - chosen, *(len(own) for own in mixtures.values())))
    for count in range(groups, most + 1, groups):
        gone = {name: least(allocation, own, count // groups, groups) for name, own in mixtures.items()}
        ranks = without(allocation, mixtures, gone)
        if int(pick(allocation.costs, ranks).sum()) <= allocation.budget:
            table = [{"module": name, "expert": expert} for name, some in gone.items() for expert in some]
            allocation.tables[DROPPED] = pa.Table.from_pylist(table)
            announce("ranks", "; ".join(f"{name}: experts {sorted(some)} go" for name, some in gone.items()))
            return ranks
    raise ParameterError(
        f"ranks.allocator = 'drop_experts': ranks.ratio = {allocation.params.ratio} is not met when {max(most, 0)} of the {min(experts.values())} "
        f"experts of every mixture go, and more cannot: a token chooses {chosen}. Lower ranks.ratio."
    )


def without(
    allocation: Allocation, mixtures: Mapping[str, Mapping[int, list[int]]], gone: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """Full rank everywhere but for the matrices of the experts that go."""
    ranks = np.array([site.full_rank for site in allocation.sites])
    ranks[[row for name, some in gone.items() for expert in some for row in mixtures[name][expert]]] = 0
    return ranks


def find_mixtures(allocation: Allocation) -> dict[str, dict[int, list[int]]]:
    """By module of experts, of each expert the rows of its matrices in their order; of those whose matrices all have a choice."""
    found: dict[str, dict[int, list[int]]] = {}
    for row, site in enumerate(allocation.sites):
        layer = site.layers[0]
        if layer.stack and len(site.layers) == 1:
            found.setdefault(layer.stack.rpartition(".")[0], {}).setdefault(layer.expert, []).append(row)
    for own in found.values():
        matrices = max(map(len, own.values()))
        for expert in [expert for expert, rows in own.items() if len(rows) < matrices]:
            del own[expert]
    return found


def least(allocation: Allocation, own: dict[int, list[int]], count: int, groups: int) -> list[int]:
    """The `count` experts of least mass in each of the equal groups that the router knows."""
    mass = {expert: float(np.square(allocation.spectra[rows[-1]]).sum()) for expert, rows in own.items()}
    size = -(-(max(mass) + 1) // groups)
    members = [[expert for expert in mass if expert // size == group] for group in range(groups)]
    return sorted(expert for some in members for expert in sorted(some, key=lambda e: (mass[e], e))[:count])


def read_dropped(ranks: Path) -> dict[str, Sequence[int]]:
    """By module of experts which go, from the published output of stage `ranks`; none where whole experts were not dropped."""
    path = ranks / f"{DROPPED}.parquet"
    found: dict[str, list[int]] = {}
    for row in pq.read_table(path).to_pylist() if path.exists() else []:
        found.setdefault(row["module"], []).append(row["expert"])
    return dict(found)
