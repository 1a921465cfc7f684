import pytest
from project import ROOT
from ruamel.yaml import YAML

from fisherfold.run.errors import ParameterError
from fisherfold.run.params import STAGES, Params, check_params, load_params
from fisherfold.run.presets import PRESETS, own_values
from fisherfold.run.targets import TARGETS
from flows.overrides import override_params

SHIPPED = ROOT / "params.yaml"


def test_the_shipped_file_has_the_defaults_and_names_every_parameter():
    document = YAML(typ="safe").load(SHIPPED)
    assert load_params(SHIPPED) == Params()
    for block in STAGES:
        params = getattr(Params(), block)
        assert list(document[block]) == list(type(params).model_fields)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"ranks": {"ratoi": 0.2}}, "unknown parameter 'ranks.ratoi'; did you mean 'ratio'?"),
        ({"rank": {}}, "unknown parameter 'rank'; did you mean 'ranks'?"),
        ({"ranks": {"ratio": 1.0}}, "ranks.ratio = 1.0: input should be less than 1"),
        ({"ranks": {"ratio": 0}}, "ranks.ratio = 0: input should be greater than 0"),
        ({"capture": {"gradients": "all"}}, "capture.gradients = 'all'"),
        ({"prepare": {"seed": "x"}}, "prepare.seed = 'x'"),
        ({"capture": {"seed": -1}}, "capture.seed = -1: input should be greater than or equal to 0"),
        (
            {"prepare": {"corpus": [{"source": "a", "share": float("inf")}]}},
            "share = inf: input should be a finite number",
        ),
        ({"factorize": {"refine": {"rate": float("nan")}}}, "factorize.refine.rate = nan"),
    ],
)
def test_wrong_parameter_is_named(document, message):
    with pytest.raises(ParameterError, match=r"^here: ") as caught:
        check_params(document, "here")
    assert message in str(caught.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ParameterError, match="does not exist"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(ParameterError, match="cannot be read"):
        load_params(tmp_path)
    for text in ("ranks: [", "report: {title: 2024-13-45}", f"ranks: {'1' * 5000}", "[" * 1200):
        (tmp_path / "params.yaml").write_text(text)
        with pytest.raises(ParameterError, match="not valid YAML"):
            load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_bytes(b"ranks: \xff")
    with pytest.raises(ParameterError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def test_override_keeps_comments_and_other_values(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    override_params(path, ["ranks.ratio=0.4", "evaluate.tasks=[mmlu]", "prepare.questions=null"])
    changed = load_params(path)
    assert (changed.ranks.ratio, changed.evaluate.tasks, changed.prepare.questions) == (0.4, ["mmlu"], None)
    assert path.read_text().count("#") == SHIPPED.read_text().count("#")


@pytest.mark.parametrize(
    "assignment", ["ranks.ratio", "ratio=0.4", "ranks.ratio=1.5", "ranks.ratio=[", "ranks.ratoi=0.4"]
)
def test_wrong_override_changes_nothing(tmp_path, assignment):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    with pytest.raises(ParameterError):
        override_params(path, ["ranks.allocator=uniform", assignment])
    assert path.read_text() == SHIPPED.read_text()


def test_a_preset_sets_its_values_and_leaves_the_others(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    assert not list(own_values("balanced", YAML(typ="safe").load(path)))
    for preset in (*PRESETS, "balanced"):
        override_params(path, [f"preset={preset}", "ranks.ratio=0.4"])
        document = YAML(typ="safe").load(path)
        assert document["preset"] == preset and not list(own_values(preset, document))
    override_params(path, ["ranks.ratio=0.2"])
    assert path.read_text() == SHIPPED.read_text()
    override_params(path, ["preset=fast", "factorize.refine.passes=1"])
    assert list(own_values("fast", YAML(typ="safe").load(path))) == ["factorize.refine.passes = 1"]
    with pytest.raises(ParameterError, match="preset = 'fastest'"):
        override_params(path, ["preset=fastest"])


def test_presets_set_the_same_parameters_to_values_that_are_valid():
    assert {tuple(values) for values in PRESETS.values()} == {tuple(PRESETS["balanced"])}


def test_a_target_sets_what_suits_its_engine(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text())
    override_params(path, ["factorize.target=vllm", "ranks.ratio=0.4"])
    document = YAML(typ="safe").load(path)
    assert (document["ranks"]["storage"], document["ranks"]["round_to"]) == ("pivoted", 32)
    override_params(path, ["factorize.target=gguf"])
    assert YAML(typ="safe").load(path)["factorize"]["gguf_export"]
    override_params(path, ["factorize.target=transformers", "ranks.ratio=0.2"])
    assert path.read_text() == SHIPPED.read_text()
    with pytest.raises(ParameterError, match=r"factorize\.target = 'onnx'"):
        override_params(path, ["factorize.target=onnx"])


def test_targets_set_the_same_parameters():
    assert {tuple(target.values) for target in TARGETS.values()} == {tuple(TARGETS["transformers"].values)}
