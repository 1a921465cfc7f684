import base64
import hashlib
import html.parser
import json
import re
import shlex
import shutil
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recorded_run import LLAMA, evaluation, finished, layer_rows, publish, said, spectra_rows

from fisherfold.page.cut_view import cut_view, nats, refinement_view
from fisherfold.page.layer_views import gather, parameter_map, place, rank_views, spectra_of, spectrum_views
from fisherfold.page.page import Markup, element, megabytes, number, percent, stand_alone
from fisherfold.page.pictures import Line, line_chart
from fisherfold.page.record import Record
from fisherfold.page.reproduce_view import reproduce_view
from fisherfold.page.trajectory_view import trajectory_view
from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.params import Params, ReportParams
from fisherfold.run.scratch import Scratch, scratch_folder
from fisherfold.run.times import note_speed, timed
from fisherfold.run.workspace import Workspace
from flows.overrides import given
from stages import report

VOID = {"meta", "br", "hr", "img", "link", "input"}


def write(workspace: Workspace) -> str:
    report.run(workspace, ReportParams())
    assert [path.name for path in sorted(workspace.out("report").iterdir())] == ["index.html", "manifest.json"]
    return (workspace.out("report") / "index.html").read_text()


class Page(html.parser.HTMLParser):
    """Collects elements and text (that of scripts apart), and checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words).replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_one_file_that_loads_nothing(tmp_path):
    text = write(finished(tmp_path, LLAMA))
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "image", "use"}
    assert not {name for _, attributes in page.elements for name in attributes} & {
        "src",
        "srcset",
        "xlink:href",
        "data",
    }
    own = text
    for script in page.scripts:
        own = own.replace(script, "")
    assert len(page.scripts) > 4 and not re.search(r"url\(|@import|@font-face", own)
    addresses = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    anchors = {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    assert addresses and all(address.startswith("https://") or address in anchors for address in addresses)
    assert all(tag == "a" for tag, attributes in page.elements if "href" in attributes)
    assert len(text) < 10e6


def test_only_its_own_scripts_may_run(tmp_path):
    """The policy holds the digest of every script, and forbids all else; what the pictures are drawn from is data."""
    page = Page(write(finished(tmp_path, LLAMA)))
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy.partition("script-src")[2]
    kinds = [script.get("type") for script in page.all("script")]
    for kind, script in zip(kinds, page.scripts, strict=True):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert (json.loads(script)["kind"] in ("heat", "lines", "bars")) if kind else f"'sha256-{digest}'" in policy
    assert kinds.count(None) == 2 and len(page.all("svg")) > len(kinds) - 2 > 4


def test_the_figures_are_there(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    text = Page(write(workspace)).text
    found = json.loads((workspace.out("evaluate") / "metrics.json").read_text())
    for expected in (
        "stores 80.0 % of the parameters of its 6 targeted layers, which is 90.0 % of the whole model: 7.20 MB instead of 8.00 MB",
        f"perplexity is {number(found['compressed']['perplexity'])} where the dense model has {number(found['dense']['perplexity'])}",
        "Of 20 knowledge questions it answers 35.0 % right, the dense model 50.0 %: a difference of −15.0 points",
        "96 tokens of 8 calibration sequences",
        "1 skipped because a gradient was not finite (5); every sequence's gradient was kept as a sketch of rank 4",
        "1 layer was left dense",
        "All parameters are as shipped.",
        "Optimizing neural networks with Kronecker-factored approximate curvature",
    ):
        assert expected in text


def test_it_can_be_read_without_seeing_it(tmp_path):
    page = Page(write(finished(tmp_path, LLAMA)))
    assert page.all("html") == [{"lang": "en"}]
    pictures = page.all("svg")
    assert len(pictures) > 4
    assert all(picture.get("aria-label") or picture.get("aria-hidden") == "true" for picture in pictures)
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert page.elements.index(("h1", {})) < page.elements.index(("h2", {}))


def test_the_same_bytes_again(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    first = write(workspace)
    shutil.rmtree(workspace.out("report"))
    shutil.rmtree(scratch_folder(workspace, "report"))
    assert write(workspace) == first
    assert not re.search(r"20\d\d-\d\d-\d\d", Page(first).text)


def test_odd_names_are_text(tmp_path):
    odd = [
        "h.0.<b>bold</b>",
        "h.1.<b>bold</b>",
        "h.0.a&b\"'",
        "lm_head",
        "x.<script>alert(1)</script>",
        f"h.0.{'long' * 40}",
    ]
    workspace = finished(tmp_path, odd)
    publish(workspace, "prepare", prepare__json={"model": {"name": "<i>model</i>"}})
    report.run(workspace, ReportParams(title="<u>Title</u>"))
    page = Page((workspace.out("report") / "index.html").read_text())
    assert not {"b", "i", "u"} & {tag for tag, _ in page.elements}
    assert not any("<script>alert" in script for script in page.scripts)
    assert "<b>bold</b>" in page.text and "<u>Title</u>" in page.text and "<i>model</i>" in page.text


@pytest.mark.parametrize(
    "modules",
    [
        [f"transformer.h.{block}.{kind}" for block in range(2) for kind in ("attn.c_attn", "mlp.c_fc")],
        [f"model.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(200) for expert in range(2)],
        ["only"],
    ],
)
def test_other_architectures(tmp_path, modules):
    Page(write(finished(tmp_path, modules)))


def test_without_questions_and_optional_facts(tmp_path):
    evaluated = evaluation(questions=False)
    del evaluated["losses__csv"], evaluated["tasks__json"]
    workspace = finished(tmp_path, LLAMA, evaluated)
    publish(workspace, "capture", capture__json={})
    publish(workspace, "kronecker", kronecker__json={})
    publish(workspace, "subspace", subspace__json={})
    page = Page(write(workspace))
    assert "knowledge questions" not in page.text.lower() and "None" not in page.text and "nan" not in page.text
    assert "The capture stage recorded no facts." in page.text


def test_the_verdict_stands_first_and_sees_empty_answers(tmp_path):
    samples = [said("Hello?", "Hi.", ""), said("Why?", "Because <b>so</b>.\n\nIt is.", "Because, because,", loops=True)]
    text = write(finished(tmp_path, LLAMA, evaluation(samples=samples)))
    page = Page(text)
    assert (
        page.elements.index(("h1", {}))
        < page.elements.index(("div", page.all("div")[0]))
        < page.elements.index(("h2", {}))
    )
    assert page.all("div")[0]["class"] == "verdict damaged"
    assert "Damaged. Not to be used as it is." in page.text.replace("  ", " ")
    assert "1 of 2 answers are empty; of the dense model's, 0." in page.text
    assert "(empty)" in page.text and "(repeats itself)" in page.text
    assert "Because <b>so</b>.\n\nIt is." in page.text and "b" not in {tag for tag, _ in page.elements}


def test_many_answers_fold_away(tmp_path):
    samples = [said(f"prompt {i}", "yes " * 1000, "no") for i in range(70)]
    page = Page(write(finished(tmp_path, LLAMA, evaluation(samples=samples))))
    assert "56 more answers. The first 64 of 70 are here." in page.text
    assert "prompt 63" in page.text and "prompt 64" not in page.text
    assert "0.100" in page.text and "± 0.020" in page.text


def test_a_model_without_prompts_says_so(tmp_path):
    text = Page(write(finished(tmp_path, LLAMA))).text
    assert "how the compressed model answers is not known" in text
    assert "How it answers is not known" in text  # in the verdict too


def test_sources_are_told_apart(tmp_path):
    page = Page(write(finished(tmp_path, LLAMA)))
    assert "by source of the text" in page.text and "<b>odd</b>" in page.text
    assert "b" not in {tag for tag, _ in page.elements}


def test_the_model_card_gets_its_results(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    with Scratch(workspace, "factorize", Params().factorize, {"card": ""}) as scratch, scratch.publish() as out:
        (out / "factorize.json").write_text("{}")
        (out / "model").mkdir()
        (out / "model" / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n\n<!-- results -->\n## Use\n")
    report.run(workspace, ReportParams())
    card = (workspace.out("report") / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nmodel-index: ")
    assert "## Results\n\nVerdict: " in card and card.endswith("## Use\n")


def test_further_tasks(tmp_path):
    result = {"metrics": {"acc": {"value": 0.25, "standard_error": None}}, "documents": 12}
    tasks = {"mmlu": {"dense": {"mmlu": result}, "compressed": {"mmlu": result}}}
    page = Page(write(finished(tmp_path, LLAMA, evaluation() | {"tasks__json": tasks})))
    assert "mmlu, acc" in page.text and "0.2500" in page.text


def test_a_stage_that_has_not_finished_is_named(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    shutil.rmtree(workspace.out("ranks"))
    with pytest.raises(CorruptArtifact, match="stage 'ranks' has not finished"):
        report.run(workspace, ReportParams())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("transformer.h.11.attn.c_attn", (11, "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.up_proj", (2, "mlp.experts.*.up_proj")),
        ("lm_head", (0, "lm_head")),
        ("blocks.4", (0, "blocks.4")),
    ],
)
def test_place_of_a_module(module, expected):
    assert place(module) == expected


def test_modules_of_one_cell_are_joined():
    names = ["layers.0.experts.0.up", "layers.0.experts.1.up", "layers.1.experts.0.up"]
    assert gather(names) == {"experts.*.up": {0: names[:2], 1: names[2:]}}


def test_spectra_by_module():
    found = spectra_of(spectra_rows(["b", "a"]))
    assert list(found) == ["b", "a"]
    assert found["a"].tolist() == [3.0, 1.0, 0.1, 0.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "–"),
        (0, "0"),
        (0.0, "0.0"),
        (33.92, "33.9"),
        (1234.5, "1,234"),
        (-0.01234, "−0.0123"),
        (9.999, "10.00"),
        (3e7, "3.00e+07"),
        (106168320, "106,168,320"),
    ],
)
def test_numbers_for_people(value, expected):
    assert number(value) == expected


def test_units_and_escapes():
    assert (percent(0.8), percent(-0.05, sign=True), megabytes(538_090_408), megabytes(12)) == tuple(
        text.replace(" ", "\N{NO-BREAK SPACE}") for text in ("80.0 %", "−5.0 %", "538 MB", "12 B")
    )
    assert (
        element("p", "a < b", Markup("<i>c</i>"), None, class_="x", title='"')
        == '<p class="x" title="&#34;">a &lt; b<i>c</i></p>'
    )


@pytest.mark.parametrize(
    "points",
    [[], [(0, 1)], [(0, 5), (1, 5)], [(0, float("nan")), (1, 2), (2, float("inf"))], [(0, -1e-9), (1e9, 1e-9)]],
)
def test_charts_of_awkward_data(points):
    chart = line_chart("label", [Line("line", points)], "x", "y")
    assert "nan" not in chart and "inf" not in chart


def test_layers_that_share_a_right_factor_are_shown_together():
    rows = [
        {"module": f"model.layers.0.attn.{name}", "n": n, "m": 8, "rank": 6, "stored_parameters": stored, "dense_parameters": 8 * n,
         "method": "fasc", "allocator": "fisher", "storage": "factors", "site": "model.layers.0.attn.q"}
        for name, n, stored in (("q", 8, 48 + 48), ("k", 2, 12), ("v", 2, 12))
    ]  # fmt: skip
    picture = rank_views(rows)
    assert picture.count("125.0% of its parameters kept".replace("%", " %")) in (0, 3)
    assert "attn.k, block 0: rank 2 of 2" in picture
    assert "share one right factor" in picture
    spectra = pa.table({"module": ["model.layers.0.attn.q"] * 8, "sigma": np.linspace(1, 0.1, 8)})
    assert spectrum_views(spectra, rows).count('class="dot"') == 1


def test_the_descent_is_shown():
    rows = layer_rows(["model.layers.0.q", "model.layers.1.q", "model.layers.0.o"])
    steps = [
        {"step": step, "loss": 2.0 - step / 4, "tau": 0.1 / (1 + step), "module": row["module"], "mu": 2.0 + step / 10}
        for step in range(4)
        for row in rows
    ]
    view = trajectory_view(steps, rows)
    assert "over the 4 steps of FermiGrad" in view
    assert "2.00 on average, that of the last 1.25" in view
    assert view.count("<polyline") == 2
    assert trajectory_view([], rows) is None


def test_doing_it_again_sets_every_changed_parameter():
    """The command, typed into a shell, gives the parameters back."""
    changed = [
        "ranks.ratio=0.35",
        "ranks.fixed.model.layers.0.mlp.up_proj=128",
        "ranks.fermigrad.steps=80",
        "prepare.questions=null",
    ]
    changed += [
        "prepare.corpus=[{source: my texts.txt, share: 2}, {source: wikipedia-leads}]",
        'prepare.gates=["it\'s", b]',
    ]
    changed += ["factorize.refine.passes=0"]
    params = given(changed)
    blocks = params.model_dump(mode="json")
    text = Page(reproduce_view({stage: blocks[stage] for stage in ("prepare", "ranks", "evaluate")})).text
    command = text[text.index("fisherfold run") : text.index("Or through DVC")]
    words = [word for word in shlex.split(command) if "=" in word]
    assert len(words) == 6 and given([*words, "factorize.refine.passes=0"]) == params
    assert "factorize.refine.passes=0" in reproduce_view({"factorize": blocks["factorize"]})


def test_the_contents_link_to_every_section(tmp_path):
    page = Page(write(finished(tmp_path, LLAMA)))
    sections = [attributes["id"] for attributes in page.all("section")]
    assert len(set(sections)) == len(sections) > 8
    assert [link["href"] for link in page.all("a")][1 : len(sections) + 1] == [f"#{name}" for name in sections]
    assert "what-to-do-next" in sections and "where-the-parameters-went" in sections


def test_predicted_and_measured_by_layer():
    rows = layer_rows(["model.layers.0.q", "model.layers.1.q"])
    sigma = {row["module"]: np.array([2.0, 1.0, 1.0, 1.0]) for row in rows}
    stored = {"model.layers.0.q": {"reconstruction_error": 0.25}}
    view = cut_view(sigma, rows, stored, (1.5, 0.1))
    assert "model.layers.0.q: predicted loss 1.50, error of the weight 0.250" in view  # ½ (1 + 1 + 1)
    assert "model.layers.1.q" not in view and "predicted 1.50 before" in view
    assert cut_view(sigma, rows, {}, (None, None)) is None


def test_refinement_by_block():
    rows = [
        {"block": f"b.{i}", "held_out_before": 2.0, "held_out_after": 2.0 - i, "accepted": i > 0, "steps": 4}
        for i in range(2)
    ]
    view = refinement_view(rows)
    assert "1 of 2 blocks got better" in view and "by 25 % on average" in view and view.count("<polyline") == 1
    assert "no layer was cut" not in view
    left = {"block": "b.2", "held_out_before": 2.0, "held_out_after": 2.0, "accepted": False, "steps": 0}
    view = refinement_view([*rows, left])
    assert "1 of 2 blocks got better" in view and "by 25 % on average" in view and "1 of which no layer was cut" in view
    assert refinement_view([]) is None


def test_what_no_two_runs_share_is_on_the_page_that_is_looked_at_alone(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    before = write(workspace)
    for stage, text in (("capture", "slow"), ("factorize", "quick")):
        with timed(workspace, stage):
            assert text
    pace = {"dense": 20.0, "compressed": 25.0}
    tokens = {"read": 512, "prompt": 32, "written": 32}
    note_speed(
        workspace,
        {"reading": pace, "answering": pace, "tokens": tokens, "dtype": "float32", "device": "cpu", "threads": 2},
    )
    rows = [
        {
            "metric": "kfac",
            "allocator": "fisher",
            "kept": 1 - ratio,
            "ratio": ratio,
            "perplexity": 10 / (1 - ratio),
            "perplexity_dense": 10.0,
        }
        for ratio in (0.2, 0.4)
    ]
    (workspace.artifacts / "sweep").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), workspace.artifacts / "sweep" / "results.parquet")
    page = Page(report.write_page(Record(workspace, beside=True), "Title"))
    sections = [attributes["id"] for attributes in page.all("section")]
    assert {"how-fast-it-is", "quality-against-size", "what-the-run-took"} <= {*sections}
    for text in (
        "writes 25.0 tokens a second, the dense model 20.0 (1.25 times)",
        "Memory at most",
        "2 models of the last sweep",
    ):
        assert text in page.text
    shutil.rmtree(workspace.out("report"))
    shutil.rmtree(scratch_folder(workspace, "report"))
    assert write(workspace) == before and "how-fast-it-is" not in before


def test_what_the_model_was_made_of_and_what_to_beware_of(tmp_path):
    workspace = finished(tmp_path, LLAMA)
    corpus = [{"name": "theirs", "origin": "hub", "digest": "ab" * 32, "licence": None}]
    publish(workspace, "prepare", prepare__json={"model": {"name": "tiny", "licence": "Apache-2.0"}, "corpus": corpus})
    text = Page(write(workspace)).text
    assert "No licence is stated for theirs" in text and "abababababababab" in text
    assert "left out, for their gradient was not finite: 1." in text


def test_a_prediction_has_the_unit_of_the_loss_where_the_metric_is_a_fisher():
    facts = {"capture": {"sequence_length": 11, "labels": "model"}, "subspace": {"metric": "kfac"}}
    assert nats(facts) == 100.0
    assert nats(facts | {"subspace": {"metric": "svd_llm"}}) is None and nats(facts | {"capture": {}}) is None
    rows = layer_rows(["model.layers.0.q"])
    stored = {"model.layers.0.q": {"reconstruction_error": 0.25}}
    view = cut_view({"model.layers.0.q": np.array([2.0, 1.0, 1.0, 1.0])}, rows, stored, (0.001, 0.11), 100.0)
    assert "would rise by 0.100 nats a token; on held-out text it rose by 0.110" in view


def test_a_picture_alone_is_an_svg_file():
    found = ElementTree.fromstring(stand_alone(parameter_map(layer_rows(["a.0.q", "a.1.q"]))))
    assert found.tag == "{http://www.w3.org/2000/svg}svg" and len(found) > 4
