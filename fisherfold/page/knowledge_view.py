"""Where knowledge sits: Fisher mass and ρ of every decoder block on knowledge questions, beside those of plain text."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from fisherfold.page.layer_views import place
from fisherfold.page.page import details, element, figure, join, number, percent, section, table
from fisherfold.page.pictures import Line, legend, line_chart

SOURCES = {"questions": "fisher_mass", "plain text": "text_mass"}
RHO = "rho_kfac"


def knowledge_view(answers: Sequence[Mapping[str, Any]], dependence: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Two pictures and a table, a row a block; None if no question was asked.

    Args:
        answers: questions.parquet of stage `capture`.
        dependence: dependence.parquet of stage `kronecker`; none if no tokens were captured.
    """
    if not answers:
        return None
    masses = {name: mass_shares(answers, column) for name, column in SOURCES.items()}
    rhos = {"questions": mean_rho(answers), "plain text": mean_rho(dependence)}
    return section(
        "Where knowledge sits",
        element(
            "p",
            f"{answers[0]['questions']} knowledge questions were asked with their right answers; the loss counts the answer's tokens alone. "
            "A block's Fisher mass is its share of Σ‖G‖², G the gradient of a question (or of a calibration sequence). "
            "ρ says how far the Fisher of what a layer reads is from the product of independent factors: |E[(gᵀx)²] − tr(S_xx S_gg)| / "
            "tr(S_xx S_gg), the mean over the block's inputs. Questions and text differ in length and loss, so compare shapes and not heights of ρ.",
        ),
        _picture("Share of the Fisher mass by decoder block", masses, "share"),
        _picture("ρ by decoder block", rhos, "ρ"),
        details("Fisher mass and ρ of every block as a table", _block_table(masses, rhos)),
    )


def mass_shares(rows: Iterable[Mapping[str, Any]], column: str) -> dict[int, float]:
    """Share of the sum over all layers by block; empty if it was not measured."""
    by_block: dict[int, float] = defaultdict(float)
    for row in rows:
        if row[column] is not None:
            by_block[place(row["module"])[0]] += row[column]
    total = sum(by_block.values())
    return {block: value / total for block, value in sorted(by_block.items())} if total > 0 else {}


def mean_rho(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Mean ρ over the inputs of a block where it was measured."""
    by_block: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(RHO) is not None:
            by_block[place(row["module"])[0]].append(row[RHO])
    return {block: fmean(values) for block, values in sorted(by_block.items())}


def _picture(label: str, found: Mapping[str, Mapping[int, float]], unit: str) -> Markup | None:
    lines = [Line(name, list(values.items()), i) for i, (name, values) in enumerate(found.items()) if values]
    if not lines:
        return None
    return figure(join([line_chart(label, lines, "decoder block", unit), legend(lines)]), label + ".")


def _block_table(masses: Mapping[str, Mapping[int, float]], rhos: Mapping[str, Mapping[int, float]]) -> Markup:
    masses, rhos = ({name: found for name, found in each.items() if found} for each in (masses, rhos))
    blocks = sorted({block for found in (*masses.values(), *rhos.values()) for block in found})
    body = [
        (
            block,
            *(percent(found.get(block)) for found in masses.values()),
            *(number(found.get(block)) for found in rhos.values()),
        )
        for block in blocks
    ]
    header = ("block", *(f"Fisher mass, {name}" for name in masses), *(f"ρ, {name}" for name in rhos))
    return table("Fisher mass and ρ by decoder block", header, body)
