"""Stage `report`: what was compressed, how far, and at what cost, as one page that opens offline.

artifacts/report/index.html      nothing loaded from anywhere, no scripts but its own, the same bytes for the same run
artifacts/report/README.md       the compressed model's card with what was measured, to take the place of the one in its folder

Times, memory and speed differ from run to run, so they are on no page of this stage: `flows.report_page` writes the same page with them.
"""

import math
from typing import Any

from markupsafe import Markup

from fisherfold.evaluation.verdict import verdict
from fisherfold.export.card_results import with_results
from fisherfold.page.answers_view import answers_view
from fisherfold.page.cost_view import cost_view, speed_view
from fisherfold.page.cut_view import cut_view, nats, refinement_view
from fisherfold.page.facts_view import facts_view
from fisherfold.page.knowledge_view import knowledge_view
from fisherfold.page.layer_views import kind_table, rank_views, spectra_of, spectrum_views
from fisherfold.page.measurement_view import measurement_view
from fisherfold.page.next_view import next_view
from fisherfold.page.origin_view import origin_view
from fisherfold.page.page import contents, element, page, section
from fisherfold.page.quality_view import quality_view
from fisherfold.page.record import Record
from fisherfold.page.references_view import references_view
from fisherfold.page.reproduce_view import reproduce_view
from fisherfold.page.size_view import size_view
from fisherfold.page.summary_view import cards, kicker, model_name, summary
from fisherfold.page.sweep_view import sweep_view
from fisherfold.page.trajectory_view import trajectory_view
from fisherfold.page.verdict_view import verdict_view
from fisherfold.run.params import ReportParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import MODELS, Workspace

CARD = "model/README.md"
THEME = element("button", "Light or dark", id="theme", type="button", hidden="hidden")


def run(workspace: Workspace, params: ReportParams) -> None:
    """Write the page from the published outputs of all stages.

    Raises:
        CorruptArtifact: a stage has not finished, or its output is not whole.
    """
    record = Record(workspace)
    with Scratch(workspace, "report", params, record.digests()) as scratch:
        if scratch.republish():
            return
        with scratch.publish() as out:
            (out / "index.html").write_text(write_page(record, params.title), encoding="utf-8")
            if card := record.text("factorize", CARD):
                answers = record.rows("evaluate", "answers.parquet")
                (out / "README.md").write_text(with_results(card, record.metrics, answers), encoding="utf-8")


def write_page(record: Record, title: str) -> str:
    """The page as text."""
    ranks, judged = record.rows("ranks", "ranks.parquet"), verdict(record.metrics)
    parts = [
        quality_view(record),
        answers_view(record.rows("evaluate", "answers.parquet"), record.metrics),
        size_view(record),
        speed_view(record),
        sweep_view(record),
        next_view(judged.level, record.facts["ranks"].get("ratio")),
        _layers(ranks),
        trajectory_view(record.rows("ranks", "trajectory.parquet"), ranks),
        _spectra(record, ranks),
        _cut(record, ranks),
        refinement_view(record.rows("factorize", "refinement.parquet")),
        knowledge_view(record.rows("capture", "questions.parquet"), record.rows("kronecker", "dependence.parquet")),
        measurement_view(record),
        cost_view(record),
        origin_view(record),
        facts_view(record),
        reproduce_view(record.params),
        references_view(record, ranks),
    ]
    return page(
        f"{title}: {model_name(record)}",
        THEME,
        element("h1", title),
        element("p", kicker(record, ranks), class_="kicker"),
        verdict_view(judged.level, judged.sentences),
        cards(record),
        element("p", summary(record, len(ranks)), class_="summary"),
        contents(parts),
        *parts,
    )


def _layers(ranks: list[dict[str, Any]]) -> Markup | None:
    return section("Where the parameters went", rank_views(ranks), kind_table(ranks)) if ranks else None


def _spectra(record: Record, ranks: list[dict[str, Any]]) -> Markup | None:
    spectra = record.table("subspace", "spectra.parquet")
    return section("Spectra", spectrum_views(spectra, ranks)) if spectra is not None and spectra.num_rows else None


def _cut(record: Record, ranks: list[dict[str, Any]]) -> Markup | None:
    spectra = record.table("subspace", "spectra.parquet")
    if spectra is None or not spectra.num_rows:
        return None
    perplexities = [record.metrics[model]["perplexity"] for model in MODELS]
    measured = math.log(perplexities[1] / perplexities[0]) if all(perplexities) else None
    losses = record.facts["ranks"].get("predicted_loss_increase"), measured
    return cut_view(spectra_of(spectra), ranks, record.facts["factorize"].get("layers", {}), losses, nats(record.facts))
