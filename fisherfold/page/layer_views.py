"""Views of a model's layers for the report: one row per kind of module, one column per decoder block.

A module's place is read from its name: the first number in it is the block, what follows is the kind, and later numbers
(experts) are joined into one cell. A module without a number (an output head) is a row of its own in column 0.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from fisherfold.page.page import details, element, figure, join, number, percent, table
from fisherfold.page.pictures import Cell, Line, heat_map, line_chart
from fisherfold.run.long_tables import module_rows

STORED = ("stored_parameters", "dense_parameters")
SPECTRUM_POINTS = 64
SPECTRUM_BLOCKS = 6
SPECTRUM_KINDS = 12
COMPARED = {
    "residual": "relative residual",
    "sampling_error": "error between halves",
    "input_variance": "variance of A",
    "output_variance": "variance of B",
    "input_rank": "effective rank of A",
    "output_rank": "effective rank of B",
}


def place(module: str) -> tuple[int, str]:
    """(block, kind) of a module: ``model.layers.3.mlp.up_proj`` is (3, ``mlp.up_proj``)."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return 0, module
    return int(parts[at]), ".".join("*" if part.isdigit() else part for part in parts[at + 1 :])


def gather(modules: Iterable[str]) -> dict[str, dict[int, list[str]]]:
    """Modules by kind and block, kinds in the order of the model."""
    cells: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for module in modules:
        block, kind = place(module)
        cells[kind][block].append(module)
    return cells


def _cells(modules: Sequence[str], cell: Callable[[str, int, list[str]], Cell]) -> dict[str, dict[int, Cell]]:
    return {
        kind: {block: cell(f"{kind}, block {block}", block, members) for block, members in blocks.items()}
        for kind, blocks in gather(modules).items()
    }


def parameter_map(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A picture: the share of each layer's parameters that is kept; of layers with one right factor, that of all of them."""
    by_name, sites = {row["module"]: row for row in rows}, by_site(rows)

    def cell(name: str, block: int, members: list[str]) -> Cell:
        together = {row["module"]: row for member in members for row in sites[site_of(by_name[member])]}
        stored, full = (sum(row[key] for row in together.values()) for key in STORED)
        dense = all(by_name[member]["storage"] == "dense" for member in members)
        kept = percent(stored / full)
        return Cell(stored / full, f"{name}: {kept} of its parameters kept{', left dense' if dense else ''}", dense)

    label = "Kept share of parameters by decoder block and module"
    return heat_map(label, _cells(list(by_name), cell), ("0 %", "100 % kept"))


def rank_map(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A picture: the rank of each layer as a share of its full rank."""
    by_name = {row["module"]: row for row in rows}

    def cell(name: str, block: int, members: list[str]) -> Cell:
        kept = sum(kept_rank(by_name[member]) for member in members)
        full = sum(full_rank(by_name[member]) for member in members)
        return Cell(kept / full, f"{name}: rank {kept} of {full}")

    return heat_map("Rank kept by decoder block and module", _cells(list(by_name), cell), ("rank 0", "full rank"))


def rank_views(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Kept share of parameters and of rank by layer, as pictures and as a table."""
    dense = sum(row["storage"] == "dense" for row in rows)
    return join(
        [
            figure(
                parameter_map(rows),
                f"Share of each layer's parameters that the compressed model stores. {_outlined(dense)}{_shared(rows)}",
            ),
            figure(
                rank_map(rows),
                "Rank kept, as a share of the full rank min(n, m). With pivoted storage a layer of full rank costs what it "
                "cost before.",
            ),
            details(f"Ranks of all {len(rows)} layers as a table", _rank_table(rows)),
        ]
    )


def full_rank(row: Mapping[str, Any]) -> int:
    """min(n, m) of a layer's row."""
    return min(row["n"], row["m"])


def kept_rank(row: Mapping[str, Any]) -> int:
    """The rank of a layer's own product: a factor that it shares may have more components."""
    return min(row["rank"], full_rank(row))


def site_of(row: Mapping[str, Any]) -> str:
    """The first of the layers that share this layer's right factor: itself if none does."""
    return row.get("site") or row["module"]


def by_site(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the layers that share a right factor."""
    sites: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        sites[site_of(row)].append(row)
    return sites


def site_full_ranks(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """min(Σ n, m) of every site."""
    return {site: min(sum(row["n"] for row in own), own[0]["m"]) for site, own in by_site(rows).items()}


def _outlined(dense: int) -> str:
    return (
        f"{dense} {'layer was' if dense == 1 else 'layers were'} left dense (outlined)."
        if dense
        else "No layer was left dense."
    )


def _shared(rows: Sequence[Mapping[str, Any]]) -> str:
    if not any(site_of(row) != row["module"] for row in rows):
        return ""
    return " Layers that read the same input share one right factor: they have one rank and, here, one share of parameters."


def _rank_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    header = ("module", "outputs n", "inputs m", "rank", "of full", "stored", "dense", "kept", "storage")
    body = [
        (
            row["module"], row["n"], row["m"], row["rank"], percent(kept_rank(row) / full_rank(row), 0), number(row["stored_parameters"]),
            number(row["dense_parameters"]), percent(row["stored_parameters"] / row["dense_parameters"]), row["storage"],
        )
        for row in rows
    ]  # fmt: skip
    return table("Rank and stored parameters of every layer", header, body)


def kind_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Parameters and ranks by kind of module."""
    by_name = {row["module"]: row for row in rows}
    body = []
    for kind, blocks in gather(by_name).items():
        members = [by_name[module] for modules in blocks.values() for module in modules]
        stored, dense = (sum(row[key] for row in members) for key in ("stored_parameters", "dense_parameters"))
        shares = [kept_rank(row) / full_rank(row) for row in members]
        body.append(
            (
                kind,
                len(members),
                number(dense),
                number(stored),
                percent(stored / dense),
                percent(min(shares), 0),
                percent(median(shares), 0),
                percent(max(shares), 0),
            )
        )
    header = ("kind of module", "layers", "dense", "stored", "kept", "least rank", "median rank", "largest rank")
    return table("Parameters and ranks by kind of module; ranks as shares of the full rank", header, body)


def spectrum_views(spectra: pa.Table, rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Energy of every layer, and how it falls with the component, with the place where the rank was cut."""
    sigma = spectra_of(spectra)
    energy = {module: float(np.square(values).sum()) for module, values in sigma.items()}
    return join(
        [
            _energy_map(energy),
            element("h3", "How fast the energy falls"),
            _falling_energy(sigma, {site_of(row): row["rank"] for row in rows if row["storage"] != "dense"}),
        ]
    )


def spectra_of(spectra: pa.Table) -> dict[str, np.ndarray]:
    """σ of every layer by module, from the long table."""
    sigma = spectra["sigma"].to_numpy()
    return {name: sigma[rows] for name, rows in module_rows(spectra).items()}


def _energy_map(energy: Mapping[str, float]) -> Markup:
    logs = [math.log10(value) for value in energy.values() if value > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 1.0)

    def cell(name: str, block: int, members: list[str]) -> Cell:
        value = sum(energy[member] for member in members)
        share = (math.log10(value) - low) / ((high - low) or 1) if value > 0 else 0.0
        return Cell(share, f"{name}: energy {number(value)}")

    return figure(
        heat_map(
            "Energy of each layer on a logarithmic scale",
            _cells(list(energy), cell),
            (number(10**low, 2), number(10**high, 2)),
        ),
        "Energy Σσ² of each layer under the metric, on a logarithmic scale: twice the loss that removing the whole layer is "
        "predicted to cost, where the metric is a Fisher metric.",
    )


def _falling_energy(sigma: Mapping[str, np.ndarray], ranks: Mapping[str, int]) -> Markup:
    kinds = list(gather(sigma).items())
    range_ = _log_range(sigma.values())
    panels = [_spectrum_panel(kind, blocks, sigma, ranks, range_) for kind, blocks in kinds[:SPECTRUM_KINDS]]
    left_out = f" The first {SPECTRUM_KINDS} of {len(kinds)} kinds are shown." if len(kinds) > SPECTRUM_KINDS else ""
    caption = (
        f"log₁₀ σ² over the share of components, for up to {SPECTRUM_BLOCKS} decoder blocks per kind, from the first "
        f"(faint) to the last (strong). A dot marks the rank kept: what lies to its right was removed.{left_out}"
    )
    return figure(element("div", *panels, class_="panels"), caption, wide=False)


def _log_range(spectra: Iterable[np.ndarray]) -> tuple[float, float]:
    """Range of log₁₀ σ² for all panels: from the largest down to the 2 % smallest, which would squeeze the rest."""
    logs = np.concatenate([2 * np.log10(sigma[sigma > 0]) for sigma in spectra])
    return (float(np.quantile(logs, 0.02)), float(logs.max())) if len(logs) else (0.0, 1.0)


def _spectrum_panel(
    kind: str,
    blocks: Mapping[int, list[str]],
    sigma: Mapping[str, np.ndarray],
    ranks: Mapping[str, int],
    y_range: tuple[float, float],
) -> Markup:
    shown = sorted(blocks)[:: math.ceil(len(blocks) / SPECTRUM_BLOCKS)]
    lines = [
        _spectrum_line(
            f"{kind}, block {block}", sigma[blocks[block][0]], ranks.get(blocks[block][0]), (i + 1) / len(shown)
        )
        for i, block in enumerate(shown)
    ]
    return line_chart(f"Spectra of {kind}", lines, "share of components", "log₁₀ σ²", (300, 210), kind, y_range)


def _spectrum_line(name: str, sigma: np.ndarray, rank: int | None, strength: float) -> Line:
    at = np.unique(np.linspace(0, len(sigma) - 1, min(SPECTRUM_POINTS, len(sigma))).round().astype(int))
    points = [_spectrum_point(sigma, int(i)) for i in at]
    cut = [_spectrum_point(sigma, rank - 1)] if rank and rank < len(sigma) else []
    return Line(name, points, strength=0.25 + 0.75 * strength, marks=cut)


def _spectrum_point(sigma: np.ndarray, component: int) -> tuple[float, float]:
    value = float(sigma[component])
    return (component + 1) / len(sigma), 2 * math.log10(value) if value > 0 else math.nan


def diagnostic_table(caption: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Markup | None:
    """Median and largest value by kind of module of the `columns` (key: heading) that some row has a value other than 0 for."""
    by_name = {row["module"]: row for row in rows}
    present = {key: heading for key, heading in columns.items() if any(row.get(key) for row in rows)}
    if not present:
        return None
    body = []
    for kind, blocks in gather(by_name).items():
        members = [by_name[module] for modules in blocks.values() for module in modules]
        values = {key: [row[key] for row in members if row.get(key) is not None] for key in present}
        body.append((kind, *(_median_and_largest(values[key]) for key in present)))
    return table(f"{caption}: median, and largest where it differs", ("kind of module", *present.values()), body)


def estimator_table(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Medians over layers, one row an estimator: what each of the Kronecker estimators compared is worth on the same gradients."""
    columns = {key: heading for key, heading in COMPARED.items() if any(row.get(key) is not None for row in rows)}
    if not columns:
        return None
    body = []
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        members = [row for row in rows if row["estimator"] == estimator]
        values = ([row[key] for row in members if row.get(key) is not None] for key in columns)
        body.append((estimator, *(number(float(median(column))) if column else "–" for column in values)))
    return table("Estimators of the Fisher, medians over layers", ("estimator", *columns.values()), body)


def _median_and_largest(values: Sequence[float]) -> str:
    if not values:
        return "–"
    middle, largest = ("∞" if math.isinf(value) else number(float(value)) for value in (median(values), max(values)))
    return middle if middle == largest else f"{middle} … {largest}"


def residual_map(rows: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The relative residual of the Kronecker approximation by layer; None if none was recorded."""
    residual = {row["module"]: row["residual"] for row in rows if row.get("residual") is not None}
    if not residual:
        return None

    def cell(name: str, block: int, members: list[str]) -> Cell:
        value = sum(residual[member] for member in members) / len(members)
        return Cell(value, f"{name}: relative residual {number(value)}")

    return figure(
        heat_map("Relative residual of the Kronecker approximation", _cells(list(residual), cell), ("0", "1")),
        "How far A ⊗ B is from the per-sequence Fisher F of the layer, ‖F − A ⊗ B‖ / ‖F‖ at its best scale: 0 is "
        "exact, 1 no better than nothing.",
    )
