"""A folder of task files is data: nothing of it runs unless it is trusted."""

import jinja2
import lm_eval.utils
import pytest
from project import ROOT

from fisherfold.evaluation import tasks
from fisherfold.run.errors import ParameterError

SHIPPED = ROOT / "data" / "tasks"
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef run(doc):\n    return doc['question']\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "utils.py").write_text(CODE)
    (tmp_path / "questions.jsonl").write_text('{"question": "w3", "choices": ["w4", "w5"], "answer": 0}\n')
    write(tmp_path, "plain.yaml", TASK)
    return tmp_path


def write(folder, name: str, text: str) -> None:
    (folder / name).write_text(text.replace("CACHE", str(folder / "cache")))


def with_function(text: str = TASK) -> str:
    return text.replace("doc_to_text: question", "doc_to_text: !function utils.run")


def test_a_task_without_code_loads(folder):
    assert list(tasks.load_task("mine", folder)["tasks"]) == ["mine"]


@pytest.mark.parametrize("place", ["itself", "include", "group", "tag", "nested include"])
def test_a_function_is_refused_before_it_runs(folder, place):
    write(folder, "plain.yaml", with_function(TASK.replace("task: mine", "task: mine\ntag: tagged")))
    name, file = {"tag": ("tagged", "plain.yaml")}.get(place, ("mine", "plain.yaml"))
    if place == "include":
        write(folder, "other.yaml", "include: plain.yaml\ntask: other\ndoc_to_text: question\n")
        name = "other"
    elif place == "nested include":
        (folder / "away").mkdir()
        write(folder, "away/base.txt", with_function("doc_to_text: question\n"))
        write(folder, "middle.txt", "include: away/base.txt\n")
        write(
            folder,
            "other.yaml",
            f"include: middle.txt\n{TASK.replace('mine', 'other').replace('doc_to_text: question', '')}",
        )
        name, file = "other", "away/base.txt"
    elif place == "group":
        write(folder, "group.yaml", "group: all\ntask: [{group: inner, task: [mine]}]\n")
        name = "all"
    with pytest.raises(ParameterError, match=rf"{file}, line \d+: !function utils.run. .*evaluate.trust_task_code"):
        tasks.load_task(name, folder)
    assert not (folder / "ran").exists()


def test_a_trusted_folder_may_run(folder):
    write(folder, "plain.yaml", with_function())
    tasks.load_task("mine", folder, trusted=True)
    assert (folder / "ran").exists()


@pytest.mark.parametrize(
    "metric", ["{metric: ./metric.py}", "{metric: acc, hf_evaluate: true}", "{metric: rouge_from_the_hub}"]
)
def test_a_metric_that_would_be_fetched_is_refused(folder, metric):
    write(folder, "plain.yaml", TASK.replace("{metric: acc}", metric))
    with pytest.raises(ParameterError, match="would be fetched and run"):
        tasks.load_task("mine", folder)


def test_only_the_function_of_this_package_is_free(folder):
    (folder / "a_val.csv").write_text("w1,1,2,3,4,A\n")
    assert tasks.load_task("four_choice_val", folder, SHIPPED)["tasks"]
    shadow = folder / "fisherfold" / "evaluation" / "tasks.py"
    shadow.parent.mkdir(parents=True)
    shadow.write_text(CODE)
    text = (SHIPPED / "four_choice_test.yaml").read_text()
    write(folder, "own.yaml", text.replace("group: four_choice_test", "group: own"))
    with pytest.raises(ParameterError, match=r"!function fisherfold.evaluation.tasks.four_choice_csv"):
        tasks.load_task("own", folder, SHIPPED)


def test_templates_render_in_a_sandbox():
    assert (
        lm_eval.utils.apply_template(
            "{{ question.strip() }} {{ 'aXb' | regex_replace('X', '-') }}", {"question": " q "}
        )
        == "q a-b"
    )
    with pytest.raises(jinja2.exceptions.SecurityError):
        lm_eval.utils.apply_template("{{ ''.__class__.__mro__[1].__subclasses__() }}", {})
