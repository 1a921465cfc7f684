"""Where the bounds of a verdict lie: one model compressed further and further, what stage evaluate says of each, and what is left of its use.

    python benchmarks/verdicts.py --project P                      # ratios 0.1 to 0.6; five minutes each on two cores
    python benchmarks/verdicts.py --project P --ratios 0.2,0.4
    python benchmarks/verdicts.py --project P --quick              # one ratio, few sequences, prompts and questions; no bound is judged

The project (here: the demo's) has run its stages up to subspace, and stays as it is: stages ranks, factorize and evaluate run in a folder that
goes away, with the project's parameters but for the ratio. Beside their figures stands what none of them sees: QUESTIONS, short ones with a
word that a right answer has, which the model answers in its chat format. `kept` is the share of those that the dense model answers, and the
compressed one too. The last line asks whether all models called close keep nine tenths of them, and all that keep less than two thirds are
called damaged.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter

import pyarrow.parquet as pq
from figures import figure

from fisherfold.evaluation.model_run import ModelRun, forget_models
from fisherfold.evaluation.verdict import verdict
from fisherfold.inputs.self_written import prompt_ids
from fisherfold.run.params import Params, load_params
from fisherfold.run.workspace import Workspace
from stages import evaluate, factorize, ranks

STAGES_DONE = ("prepare", "capture", "kronecker", "subspace")
TABLES = ("calibration", "tuning", "training", "evaluation", "questions", "answers")
QUICK = {"ratios": "0.2", "rows": 4, "asked": 8}
KEPT_BY_CLOSE, LOST_BY_DAMAGED = 0.9, 2 / 3
LONGEST = 40
QUESTIONS = {
    "What is the capital of France?": "paris",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of Italy?": "rome",
    "What is the capital of Germany?": "berlin",
    "What is the capital of Spain?": "madrid",
    "What is the capital of Russia?": "moscow",
    "What is 2 + 2?": "4",
    "What is 10 minus 3?": "7",
    "Which planet is known as the Red Planet?": "mars",
    "Which planet is closest to the Sun?": "mercury",
    "What is the largest planet of the solar system?": "jupiter",
    "What gas do plants take from the air?": "carbon",
    "Who wrote Hamlet?": "shakespeare",
    "Who painted the Mona Lisa?": "leonardo",
    "Who developed the theory of relativity?": "einstein",
    "Who was the first president of the United States?": "washington",
    "What is the largest ocean on Earth?": "pacific",
    "How many days are in a week?": "seven|7",
    "How many hours are in a day?": "24|twenty-four",
    "How many continents are there?": "seven|7",
    "How many legs does a spider have?": "eight|8",
    "What is the chemical symbol of water?": "h2o|h₂o",
    "What is the opposite of cold?": "hot|warm",
    "What is the opposite of up?": "down",
    "Which animal says meow?": "cat",
    "Which animal barks?": "dog",
    "What do bees make?": "honey",
    "What is frozen water called?": "ice",
    "At how many degrees Celsius does water boil?": "100",
    "What language is spoken in Brazil?": "portuguese",
    "What language is spoken in France?": "french",
    "In which country is the Great Wall?": "china",
    "In which country are the pyramids of Giza?": "egypt",
    "What is the first month of the year?": "january",
    "What day comes after Monday?": "tuesday",
    "What is the plural of child?": "children",
    "What is the past tense of go?": "went",
    "What is the tallest mountain in the world?": "everest",
    "What organ pumps blood through the body?": "heart",
    "What is the name of the star at the centre of our solar system?": "sun",
    "What is the currency of the United Kingdom?": "pound|sterling",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.6")
    parser.add_argument(
        "--rows", type=int, default=None, help="sequences, questions and prompts of stage evaluate, if not all"
    )
    parser.add_argument("--asked", type=int, default=len(QUESTIONS), help="short questions")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    project = Workspace(options.project.resolve())
    params = load_params(project.root / "params.yaml")
    print(
        f"{'ratio':>5} {'own KL':>7} {'text':>6} {'questions':>9} {'empty':>5} {'looping':>7} {'agree':>6} {'kept':>6}  {'verdict':8} {'s':>4}"
    )
    with tempfile.TemporaryDirectory(dir=project.root, suffix=".partial") as folder:
        workspace = linked(project, Path(folder), options.rows)
        rows = [measure(workspace, params, float(ratio), options.asked) for ratio in options.ratios.split(",")]
    report(rows, judged=not options.quick)


def linked(project: Workspace, folder: Path, rows: int | None) -> Workspace:
    """A workspace with the project's finished outputs and its tables, of those that are evaluated only the first `rows`."""
    workspace = Workspace(folder)
    workspace.artifacts.mkdir()
    for stage in STAGES_DONE:
        workspace.out(stage).symlink_to(project.out(stage))
    for name in TABLES:
        workspace.table(name).parent.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(project.table(name))
        cut = rows if name in ("evaluation", "questions", "answers") else None
        pq.write_table(table.slice(0, cut), workspace.table(name))
    return workspace


def measure(workspace: Workspace, params: Params, ratio: float, asked: int) -> dict:
    """One row: compress, evaluate, ask."""
    start = perf_counter()
    ranks.run(workspace, params.ranks.model_copy(update={"ratio": ratio}))
    factorize.run(workspace, params.factorize)
    evaluate.run(workspace, params.evaluate.model_copy(update={"tasks": []}))
    metrics = json.loads((workspace.out("evaluate") / "metrics.json").read_text(encoding="utf-8"))
    level = verdict(metrics).level
    kept = questions_kept(workspace, params, asked)
    print(f"{ratio:5.2f} {figures(metrics)} {kept:6.2f}  {level:8} {perf_counter() - start:4.0f}", flush=True)
    return {"ratio": ratio, "level": level, "kept": kept}


def figures(metrics: Mapping) -> str:
    """What stage evaluate measured, in a line; text is the perplexity by that of the dense model, the worst of the sources."""
    dense, compressed = metrics["dense"], metrics["compressed"]
    text = max(source["compressed"] / source["dense"] for source in metrics["by_source"].values())
    points = 100 * (compressed["knowledge_accuracy"] - dense["knowledge_accuracy"])
    return (
        f"{compressed['own_answers_kl']:7.3f} {text:6.3f} {points:+9.1f} {compressed['empty_answers']:5} "
        f"{compressed['looping_answers'] - dense['looping_answers']:+7} {compressed['greedy_agreement']:6.2f}"
    )


def questions_kept(workspace: Workspace, params: Params, asked: int) -> float:
    """Share of the short questions that the dense model answers which the compressed one answers too."""
    dense = answered(workspace.model, params, asked)
    compressed = answered(workspace.out("factorize") / "model", params, asked)
    return len(dense & compressed) / max(1, len(dense))


def answered(folder: Path, params: Params, asked: int) -> set[str]:
    """The short questions whose greedy answer has the word that it must have."""
    model = ModelRun(folder, params.evaluate.dtype, 1, 1, "")
    questions = list(QUESTIONS)[:asked]
    tokens = model.decoder.answer([prompt_ids(model.tokenizer, question) for question in questions], LONGEST)
    texts = [text.lower() for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    forget_models()
    return {
        question
        for question, text in zip(questions, texts, strict=True)
        if any(word in text for word in QUESTIONS[question].split("|"))
    }


def report(rows: list[dict], judged: bool) -> None:
    """One line of JSON."""
    wrong = [
        row["ratio"]
        for row in rows
        if (row["level"] == "close" and row["kept"] < KEPT_BY_CLOSE)
        or (row["level"] != "damaged" and row["kept"] < LOST_BY_DAMAGED)
    ]
    target = f"close keeps {KEPT_BY_CLOSE:g} of the short questions, less than {LOST_BY_DAMAGED:.2f} is damaged"
    holds = not wrong if judged else True
    print(figure("ratios whose verdict is wrong", wrong, "ratio", target, holds))


if __name__ == "__main__":
    main()
