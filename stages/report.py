"""Stage `report`: what was compressed, how far, and at what cost, as one page that opens offline.

artifacts/report/index.html      nothing loaded from anywhere, no scripts but its own, the same bytes for the same run
artifacts/report/README.md       the compressed model's card with what was measured, to take the place of the one in its folder

Times, memory and speed differ from run to run, so they are on no page of this stage: `flows.report_page` writes the same page with them.
"""

import math
from collections.abc import Iterator, Mapping

from fisherfold.evaluation.verdict import verdict
from fisherfold.export.card_results import with_results
from fisherfold.page.answers_view import answers_view
from fisherfold.page.cost_view import cost_view, speed_sentence, speed_view
from fisherfold.page.cut_view import cut_view, nats, refinement_view
from fisherfold.page.knowledge_view import knowledge_view
from fisherfold.page.layer_views import (
    diagnostic_table,
    estimator_table,
    kind_table,
    rank_views,
    residual_map,
    spectra_of,
    spectrum_views,
)
from fisherfold.page.next_view import next_view
from fisherfold.page.origin_view import origin_view
from fisherfold.page.page import (
    Markup,
    contents,
    details,
    element,
    megabytes,
    number,
    page,
    percent,
    section,
    table,
)
from fisherfold.page.quality_view import at, points, quality_view, ratio_of, times
from fisherfold.page.record import Record
from fisherfold.page.references import REFERENCES
from fisherfold.page.reproduce_view import reproduce_view
from fisherfold.page.sweep_view import sweep_view
from fisherfold.page.trajectory_view import trajectory_view
from fisherfold.page.verdict_view import verdict_view
from fisherfold.run.params import ReportParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import MODELS, Workspace

CARD = "model/README.md"
LONGEST_FACT = 300
THEME = element("button", "Light or dark", id="theme", type="button", hidden="hidden")
TRUST = (
    "The Fisher information of a layer, how much the loss minds every possible change of its weights, is approximated by two small matrices: A, "
    "which inputs occur, and B, which outputs matter. Three figures say how far to trust them. Effective tokens: how many tokens' worth of "
    "gradients B really rests on, since few large ones outweigh many small. Variance: how much A and B would change with other text, as a share "
    "of their size (more text makes it smaller). Condition: the largest over the smallest weight that the metric gives to a direction; damping "
    "keeps it from growing without bound."
)
WHAT_RATIO_IS_OF = {"model_bytes": "the whole model's bytes"}


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
        _sizes(record),
        speed_view(record),
        sweep_view(record.sweep, _here(record)),
        next_view(judged.level, record.facts["ranks"].get("ratio")),
        _layers(ranks),
        trajectory_view(record.rows("ranks", "trajectory.parquet"), ranks),
        _spectra(record, ranks),
        _cut(record, ranks),
        refinement_view(record.rows("factorize", "refinement.parquet")),
        knowledge_view(record.rows("capture", "questions.parquet"), record.rows("kronecker", "dependence.parquet")),
        _measurement(record),
        cost_view(record),
        origin_view(record),
        _settings(record),
        reproduce_view(record.params),
        _references(record, ranks),
    ]
    return page(
        f"{title}: {_model_name(record)}",
        THEME,
        element("h1", title),
        element("p", _kicker(record, ranks), class_="kicker"),
        verdict_view(judged.level, judged.sentences),
        _cards(record),
        element("p", _summary(record, len(ranks)), class_="summary"),
        contents(parts),
        *parts,
    )


def _model_name(record: Record) -> str:
    model = record.facts["prepare"].get("model")
    return str(model.get("name", "model") if isinstance(model, Mapping) else model or "model")


def _kicker(record: Record, ranks: list[dict]) -> str:
    ratio, metric = record.facts["ranks"].get("ratio"), record.facts["subspace"].get("metric")
    what = WHAT_RATIO_IS_OF.get(record.facts["ranks"].get("unit"), "the targeted parameters")
    parts = [_model_name(record)]
    parts += [f"{percent(ratio, 0)} of {what} removed"] if ratio is not None else []
    parts += [f"metric {metric}"] if metric else []
    parts += [f"ranks by {ranks[0]['allocator']}"] if ranks else []
    return " · ".join(parts)


def _kept(record: Record, what: str) -> str:
    """Share of parameters or bytes that the compressed model has, as per cent."""
    size = record.metrics["size"]
    return percent(ratio_of(size[f"{what}_compressed"], size[f"{what}_dense"]))


def _bytes(record: Record, model: str) -> str:
    return megabytes(record.metrics["size"][f"model_bytes_{model}"])


def _cards(record: Record) -> Markup:
    """The headline: five figures, four where there are no questions."""
    dense, compressed = (record.metrics[model] for model in MODELS)
    whole = _kept(record, "model_parameters")
    perplexity = f"{times(record)} × the dense model's {number(dense['perplexity'])}"
    cards = [
        (
            "Parameters kept",
            _kept(record, "targeted_parameters"),
            f"of the targeted layers; {whole} of the whole model",
        ),
        ("Perplexity", number(compressed["perplexity"]), perplexity),
        _divergence_card(compressed),
        ("Size on disk", _bytes(record, "compressed"), f"dense {_bytes(record, 'dense')}"),
    ]
    if compressed["knowledge_accuracy"] is not None:
        right = f"dense {percent(dense['knowledge_accuracy'])} right"
        cards.insert(2, ("Knowledge", percent(compressed["knowledge_accuracy"]), right))
    return element("ul", *(_card(*card) for card in cards), class_="cards")


def _divergence_card(compressed: Mapping) -> tuple[str, str, str]:
    """On the dense model's own answers, which is what counts in use; on the evaluation text where there are none."""
    own = compressed.get("own_answers_kl")
    if own is None:
        return "Divergence", number(compressed["kl_to_dense"]), "nats per token from the dense model"
    return "Divergence", number(own), "nats per token of the dense model's own answers"


def _card(name: str, value: str, note: str) -> Markup:
    lines = (("name", name), ("value", value), ("note", note))
    return element("li", *(element("span", text, class_=style) for style, text in lines))


def _summary(record: Record, layers: int) -> str:
    """The result in plain words."""
    dense, compressed = (record.metrics[model] for model in MODELS)
    sentences = [
        f"The compressed model stores {_kept(record, 'targeted_parameters')} of the parameters of its {layers} targeted "
        f"layers, which is {_kept(record, 'model_parameters')} of the whole model: {_bytes(record, 'compressed')} instead of "
        f"{_bytes(record, 'dense')}.",
        f"On text that nothing was fitted to, its perplexity is {number(compressed['perplexity'])} where the dense model has "
        f"{number(dense['perplexity'])}, {times(record)} times as much.",
    ]
    if compressed["knowledge_accuracy"] is not None:
        sentences.append(_knowledge_sentence(record))
    return " ".join([*sentences, speed_sentence(record.speed)]).strip()


def _knowledge_sentence(record: Record) -> str:
    knowledge = record.facts["evaluate"].get("knowledge") or {}
    accuracy = {model: record.metrics[model]["knowledge_accuracy"] for model in MODELS}
    difference, error = (
        accuracy["compressed"] - accuracy["dense"],
        at(knowledge, "standard_error", "acc", "difference"),
    )
    verdict = ""
    if error is not None:
        verdict = (
            ", which chance alone could explain"
            if abs(difference) <= 2 * error
            else ", which is more than chance explains"
        )
    count = f"{knowledge['questions']} " if "questions" in knowledge else "the "
    return (
        f"Of {count}knowledge questions it answers {percent(accuracy['compressed'])} right, the dense model "
        f"{percent(accuracy['dense'])}: a difference of {points(difference)}{verdict}."
    )


def _sizes(record: Record) -> Markup:
    size = record.metrics["size"]
    names = {
        "targeted_parameters": "parameters of the targeted layers",
        "model_parameters": "parameters of the whole model",
        "active_parameters": "parameters that a token meets, on average",
    }
    rows = [
        (label, *(number(size[f"{what}_{model}"]) for model in MODELS), _kept(record, what))
        for what, label in names.items()
        if f"{what}_dense" in size
    ]
    rows.append(("weights on disk", *(_bytes(record, model) for model in MODELS), _kept(record, "model_bytes")))
    caption = "Counted from the saved tensors, index arrays included"
    return section("How small it is", table(caption, ("", "dense", "compressed", "kept"), rows))


def _here(record: Record) -> tuple[float, float] | None:
    """Kept share and perplexity by the dense model's, of this run."""
    size, perplexities = record.metrics["size"], [record.metrics[model]["perplexity"] for model in MODELS]
    ratio = ratio_of(*reversed(perplexities))
    kept = ratio_of(size["targeted_parameters_compressed"], size["targeted_parameters_dense"])
    return None if ratio is None or kept is None else (kept, ratio)


def _layers(ranks: list[dict]) -> Markup | None:
    return section("Where the parameters went", rank_views(ranks), kind_table(ranks)) if ranks else None


def _spectra(record: Record, ranks: list[dict]) -> Markup | None:
    spectra = record.table("subspace", "spectra.parquet")
    return section("Spectra", spectrum_views(spectra, ranks)) if spectra is not None and spectra.num_rows else None


def _cut(record: Record, ranks: list[dict]) -> Markup | None:
    spectra = record.table("subspace", "spectra.parquet")
    if spectra is None or not spectra.num_rows:
        return None
    perplexities = [record.metrics[model]["perplexity"] for model in MODELS]
    measured = math.log(perplexities[1] / perplexities[0]) if all(perplexities) else None
    losses = record.facts["ranks"].get("predicted_loss_increase"), measured
    return cut_view(spectra_of(spectra), ranks, record.facts["factorize"].get("layers", {}), losses, nats(record.facts))


def _measurement(record: Record) -> Markup:
    """How the statistics were captured, and how far they can be trusted."""
    conditions = {
        "input_condition": "input condition",
        "output_condition": "output condition",
        "input_damping": "input damping",
        "output_damping": "output damping",
    }
    kronecker = record.rows("kronecker", "diagnostics.parquet")
    return section(
        "How it was measured",
        element("p", _capture_sentence(record.facts["capture"])),
        element("p", TRUST),
        residual_map(kronecker),
        diagnostic_table(
            "Kronecker factors",
            kronecker,
            {
                "residual": "relative residual",
                "scale": "scale",
                "iterations": "iterations",
                "sigma_ratio": "σ₁/σ₂",
                "effective_sequences": "effective sequences",
                "effective_tokens": "effective tokens",
            },
        ),
        estimator_table(record.rows("kronecker", "comparison.parquet")),
        diagnostic_table(
            "Metrics of the weighted decomposition", record.rows("subspace", "diagnostics.parquet"), conditions
        ),
    )


def _capture_sentence(facts: Mapping) -> str:
    tokens, sequences, skipped = facts.get("tokens"), facts.get("sequences"), facts.get("skipped") or []
    if tokens is None or sequences is None:
        return "The capture stage recorded no facts."
    sketch = f"every sequence's gradient was kept as a sketch of rank {facts.get('sketch_rank')}"
    form = {"none": "no per-sequence gradient was kept", "exact": "every sequence's gradient was kept in full"}
    names = ", ".join(map(str, skipped[:8])) + (", …" if len(skipped) > 8 else "")
    left_out = f"{len(skipped)} skipped because a gradient was not finite ({names})" if skipped else "none skipped"
    return (
        f"Statistics come from {number(tokens)} tokens of {number(sequences)} calibration sequences, {left_out}; "
        f"{form.get(facts.get('gradients'), sketch)}."
    )


def _settings(record: Record) -> Markup:
    """Everything the stages recorded about themselves."""
    blocks = [
        details(stage, table(f"Recorded by stage {stage}", ("fact", "value"), rows, numbers_from=2))
        for stage, facts in record.facts.items()
        if (rows := [(element("code", key), _fact(value)) for key, value in flatten(facts)])
    ]
    return section("Parameters and facts", *blocks)


def flatten(facts: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested facts as (dotted key, value), sorted."""
    if isinstance(facts, Mapping) and facts:
        for key in sorted(facts):
            yield from flatten(facts[key], f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, facts


def _fact(value: object) -> str:
    text = (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else "–"
        if value is None or value in ([], {})
        else str(value)
    )
    return text if len(text) <= LONGEST_FACT else f"{text[:LONGEST_FACT]} … ({len(text)} characters)"


def _references(record: Record, ranks: list[dict]) -> Markup | None:
    """Papers behind the methods that this run used."""
    used = [record.facts["kronecker"].get("estimator"), record.facts["subspace"].get("metric")]
    used += sorted({row[key] for row in ranks for key in ("allocator", "storage")})
    papers = list(dict.fromkeys(paper for method in used for paper in REFERENCES.get(method, ())))
    items = [
        element("li", f"{paper.authors}: {paper.title}. ", element("a", paper.where, href=paper.address))
        for paper in papers
    ]
    return section("Methods", element("ul", *items)) if items else None
