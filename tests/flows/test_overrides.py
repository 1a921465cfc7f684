"""`--set`: what is named changes, where it stands, and nothing else."""

import difflib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT
from ruamel.yaml import YAML

from fisherfold.run.errors import ParameterError
from flows.overrides import overridden, override_params, parse
from flows.yaml_edit import flow_text, set_values, with_value

SHIPPED = (ROOT / "params.yaml").read_text(encoding="utf-8")


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED, encoding="utf-8")
    return path


def changed_lines(before: str, after: str) -> list[str]:
    return [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:1] in "+-"]


def test_one_assignment_changes_one_line_and_its_comment_stays_where_it_was(params):
    told = override_params(params, ["ranks.ratio=0.4"])
    old, new = changed_lines(SHIPPED, params.read_text(encoding="utf-8"))
    assert old.startswith("-   ratio: 0.2  ") and new == old.replace("- ", "+ ", 1).replace("0.2", "0.4")
    assert told == ["ranks.ratio: 0.2 → 0.4"]


def test_a_longer_value_takes_the_space_before_its_comment(params):
    override_params(params, ["prepare.model=meta-llama/Llama-2-7b-hf", "ranks.exclude=['*.v_proj', '*.k_proj']"])
    text = params.read_text(encoding="utf-8")
    assert "  model: meta-llama/Llama-2-7b-hf  # a recipe in" in text
    assert "  exclude: ['*.v_proj', '*.k_proj']  # modules" in text
    assert len(changed_lines(SHIPPED, text)) == 4


@pytest.mark.parametrize(
    ("assignment", "block", "expected"),
    [
        ("ranks.fermigrad.steps=80", "fermigrad", {"steps": 80, "batches": 1}),
        ("ranks.fermigrad={steps: 80, batches: 2}", "fermigrad", {"steps": 80, "batches": 2}),
        ("ranks.fixed.model.layers.0.mlp.up_proj=12", "fixed", {"model.layers.0.mlp.up_proj": 12}),
        ("ranks.floor.*.v_proj=0.5", "floor", {"*.v_proj": 0.5}),
        ("ranks.floor={'*.v_proj': 0.25}", "floor", {"*.v_proj": 0.25}),
    ],
)
def test_nested_keys_leave_what_they_do_not_name(params, assignment, block, expected):
    text, found = overridden(params, [assignment])
    value = getattr(found.ranks, block)
    value = value if isinstance(value, dict) else {key: getattr(value, key) for key in expected}
    assert value == expected
    assert len(changed_lines(SHIPPED, text)) == 2 * (len(expected) if assignment.count(":") == 2 else 1)
    assert "tau_first: 0.03" in text


def test_entries_of_a_mapping_add_up(params):
    override_params(params, ["ranks.fixed.a=1"])
    _, found = overridden(params, ["ranks.fixed.b=2"])
    assert found.ranks.fixed == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("ranks.ratio", "expected STAGE.KEY=VALUE"),
        ("ranks=0.4", "expected STAGE.KEY=VALUE"),
        ("=0.4", "expected STAGE.KEY=VALUE"),
        ("ranks.ratio=[", "not valid YAML"),
        ("prepare.revision=2024-02-30", "not valid YAML (day is out of range for month)"),
        ("ranks.ratoi=0.4", "did you mean 'ratio'?"),
        ("ranks.fermigrad.stepz=4", "did you mean 'steps'?"),
        ("rank.ratio=0.4", "did you mean 'ranks'?"),
        ("ranks.ratio.deep=1", "ranks.ratio = {'deep': 1}"),
        ("ranks.ratio=1.5", "less than 1"),
        ("subspace.metric=kfca", "Did you mean 'kfac'?"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(params, wrong, says):
    with pytest.raises(ParameterError) as error:
        override_params(params, ["report.title=Other", wrong])
    assert says in str(error.value) and "\n" not in str(error.value)
    assert params.read_text(encoding="utf-8") == SHIPPED


def test_a_whole_block_may_be_given():
    assert parse("ranks={ratio: 0.4, fermigrad: {steps: 3}}") == [
        (["ranks", "ratio"], 0.4),
        (["ranks", "fermigrad", "steps"], 3),
    ]


def test_a_value_that_lives_elsewhere_in_the_file_is_not_changed_behind_its_back(params):
    params.write_text("capture: {seed: &seed 3}\nkronecker: {seed: *seed}\n", encoding="utf-8")
    with pytest.raises(ParameterError, match="by hand"):
        override_params(params, ["kronecker.seed=4"])


@pytest.mark.parametrize(
    ("text", "keys", "value", "expected"),
    [
        ("a:\n  b: 1\n\n# end\nc: 2\n", ["a", "d"], 3, "a:\n  b: 1\n  d: 3\n\n# end\nc: 2\n"),
        ("a:  # nothing yet\nc: 2\n", ["a", "d"], 3, "a: {d: 3}  # nothing yet\nc: 2\n"),
        ("a: {b: 1}  # x\n", ["a", "d"], None, "a: {b: 1, d: null}  # x\n"),
        ("a: {}\n", ["a", "d"], "x # y", "a: {d: 'x # y'}\n"),
        ("a:\n  - 1  # one\n  - 2  # two\nc: 2\n", ["a"], [3], "a: [3]  # two\nc: 2\n"),
        ("a: |\n  long\n  text\n\nc: 2\n", ["a"], "short", "a: short\n\nc: 2\n"),
        ("# nothing\n", ["a", "b"], 1, "# nothing\na: {b: 1}\n"),
        ("", ["a", "b"], 1, "a: {b: 1}\n"),
        ("a: 1", ["b"], 2, "a: 1\nb: 2\n"),
        ("a:\r\n  b: 1\r\nc: 2\r\n", ["a", "d"], 3, "a:\r\n  b: 1\r\n  d: 3\r\nc: 2\r\n"),
        ("ü:\n  b: 'ä'  # ö\n", ["ü", "b"], "→", "ü:\n  b: →    # ö\n"),
    ],
)
def test_where_a_value_goes(text, keys, value, expected):
    assert set_values(text, [(keys, value)]) == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aä→ #:'\"{}[],-|\n", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.*", min_size=1), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), VALUES, min_size=1), st.sampled_from("abc"), VALUES)
def test_any_value_in_any_text_is_what_was_asked_for(document, key, value):
    text = io.StringIO()
    YAML(pure=True).dump(document, text)
    for keys in ([key], [key, "x.y"]):
        assert YAML(typ="safe", pure=True).load(set_values(text.getvalue(), [(keys, value)])) == with_value(
            document, keys, value
        )


def test_a_value_is_one_line_of_yaml():
    assert [flow_text(value) for value in (0.4, None, True, ["a"], "a: b", "no")] == [
        "0.4",
        "null",
        "true",
        "[a]",
        "'a: b'",
        "no",
    ]
