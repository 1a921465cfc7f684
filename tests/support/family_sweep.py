"""Causal language models of the installed transformers, tiny and random, through all eight stages, and their checkpoints in a fresh interpreter.

    python tests/support/family_sweep.py --results sweep.jsonl                  # every family that the file does not have yet
    python tests/support/family_sweep.py --results sweep.jsonl mamba2 llama     # these, again
    python tests/support/family_sweep.py --results sweep.jsonl --table docs/models.md

A line of the results is {"family": …, "result": "passes", "refused" or "fails", "why": […], "coverage": {…}}. What is refused is refused in
stage `prepare`.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import transformers
from tiny import VOCABULARY
from tiny_families import causal_families, save_family

from fisherfold.run.errors import FisherfoldError
from fisherfold.run.params import Params
from fisherfold.run.workspace import STAGES, Workspace

PAGE = """# Models

Every model type for which transformers {version} has a causal language model, tiny (a width of 32, a layer of every kind) and random, through all
eight stages at `ranks.ratio: 0.4`; then its checkpoint in a fresh interpreter, once with `trust_remote_code=True` where this project cannot be
imported, once after `import fisherfold.runtime`. It passes if the logits are those of the dense model with the factors multiplied out, to 1e-4 of
their deviation, in both ways, loaded twice, saved and loaded again, and in the dense export; if it writes what that model writes, with a cache and
without; and if it can be trained. Of {all}, {passes} pass all eight stages, {refused} are refused in stage `prepare`{failing}.

The share is that of the parameters that are targets in the tiny model, whose embeddings and norms are a larger part than a real one's. The last column
says which linear layers stay dense and why, or why the model is refused. Written by

    python tests/support/family_sweep.py --results sweep.jsonl
    python tests/support/family_sweep.py --results sweep.jsonl --table docs/models.md

| model type | | share | what stays dense, or why it is refused |
|---|---|---|---|
{rows}
"""
PROJECT = Path(__file__).parents[2]
PARAMS = {
    "prepare": {
        "model": "model",
        "experts": "dense",  # those that are layers have tests of their own
        "corpus": "corpus.txt",
        "unseen": None,
        "questions": "questions.jsonl",
        "question_count": 2,
        "prompts": "prompts.txt",
        "held_out_prompts": 2,
        "answer_tokens": 5,
        "sequence_length": 16,
        "calibration_sequences": 4,
        "tuning_sequences": 2,
        "training_sequences": 0,
        "evaluation_sequences": 2,
    },
    "capture": {"threads": 1, "sequences_per_shard": 4, "tokens_per_sequence": 2, "knowledge_questions": 2},
    "kronecker": {"threads": 1, "dependence_draws": 0},
    "subspace": {"threads": 1},
    "ranks": {"threads": 1, "ratio": 0.4},
    "factorize": {"threads": 1, "dense_export": True, "refine": {"passes": 0}, "heal": {"passes": 0}},
    "evaluate": {"threads": 1, "answer_tokens": 3},
}


def workspace_of(family: str, folder: Path) -> Workspace:
    """A project folder with the family's tiny model, a corpus, questions and prompts."""
    save_family(folder / "model", family)
    generator = random.Random(0)
    words = lambda count: " ".join(f"w{generator.randrange(3, VOCABULARY)}" for _ in range(count))  # noqa: E731
    (folder / "corpus.txt").write_text("\n\n".join(words(30) for _ in range(12)) + "\n")
    (folder / "prompts.txt").write_text("\n".join(words(4) for _ in range(6)) + "\n")
    rows = [
        {"question": words(3), "choices": [words(1) for _ in range(4)], "answer": i, "article": f"q{i}"}
        for i in range(2)
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return Workspace(folder)


def run_stages(family: str, folder: Path) -> dict:
    """A line of the results, from the stages alone."""
    stage, found = "building", {"family": family, "result": "passes", "why": []}
    try:
        workspace, params = workspace_of(family, folder), Params.model_validate(PARAMS)
        for stage in STAGES:
            import_module(f"stages.{stage}").run(workspace, getattr(params, stage))
            if stage == "prepare":
                found["coverage"] = json.loads((workspace.out("prepare") / "prepare.json").read_text())["coverage"]
    except Exception as error:
        refused = stage == "prepare" and isinstance(error, FisherfoldError)
        found |= {"result": "refused" if refused else "fails"}
        found["why"] = [str(error) if refused else f"stage {stage}: {described(error)}"]
    return found


def described(error: Exception) -> str:
    """An error in a line, with the last places of ours and of anybody."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(str(PROJECT))][-1:] + frames[-1:]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours)
    return f"{type(error).__name__}: {str(error)[:400]} ({places})"


def sweep(families: Iterable[str], root: Path) -> list[dict]:
    """Lines of the results; the checkpoints of all families share one fresh interpreter."""
    lines = []
    for family in families:
        started = time.time()
        (root / family).mkdir()
        lines.append(run_stages(family, root / family))
        lines[-1]["seconds"] = round(time.time() - started, 1)
    done = {str(root / line["family"]): line for line in lines if line["result"] == "passes"}
    for folder, why in check_checkpoints(list(done)).items():
        done[folder] |= {"result": "fails" if why else "passes", "why": why}
    return lines


def check_checkpoints(folders: Sequence[str]) -> dict[str, list[str]]:
    """By folder what is wrong with its checkpoint."""
    if not folders:
        return {}
    script = Path(__file__).with_name("family_checkpoints.py")
    command = [sys.executable, "-I", script, PROJECT, *folders]
    finished = subprocess.run(command, cwd=folders[0], capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def read_results(path: Path) -> dict[str, dict]:
    """The last line of each family."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["family"]: line for line in map(json.loads, lines)}


def table(results: dict[str, dict]) -> str:
    """The results as a page of documentation."""
    counts = Counter(line["result"] for line in results.values())
    rows = "\n".join(_row(results[family]) for family in sorted(results))
    failing = f", {counts['fails']} fail" if counts["fails"] else ""
    return PAGE.format(
        version=transformers.__version__,
        all=len(results),
        passes=counts["passes"],
        refused=counts["refused"],
        failing=failing,
        rows=rows,
    )


def _row(line: dict) -> str:
    if line["result"] != "passes":
        why = re.sub(r"/\S*?(?=[\s)])", "its folder", " ".join(line["why"]).replace("Model 'model'", "The model"))
        return f"| `{line['family']}` | {line['result']} | | {why.replace('|', '/')} |"
    coverage = line["coverage"]
    dense = "; ".join(
        f"{row['reason']}: {', '.join(f'`{name}`' for name in row['names'][:3])}" for row in coverage["dense"]
    )
    share = coverage["targeted_parameters"] / coverage["model_parameters"]
    return f"| `{line['family']}` | passes | {share:.0%} | {dense} |".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument(
        "--results", type=Path, required=True, help="JSON lines, one a family; what it has is not run again"
    )
    parser.add_argument("--together", type=int, default=6, help="families that share one fresh interpreter")
    parser.add_argument("--seconds", type=float, default=240, help="begin no further families after so many")
    parser.add_argument("--table", type=Path, help="write the table of the results and run nothing")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    started, known = time.time(), read_results(arguments.results)
    if arguments.table:
        arguments.table.write_text(table(known), encoding="utf-8")
        return
    left = arguments.families or [family for family in causal_families() if family not in known]
    while left and time.time() - started < arguments.seconds:
        group, left = left[: arguments.together], left[arguments.together :]
        with tempfile.TemporaryDirectory() as root, arguments.results.open("a", encoding="utf-8") as file:
            for line in sweep(group, Path(root)):
                print(json.dumps(line), file=file, flush=True)
                print(line["result"], line["family"], line["seconds"], *line["why"][:3], flush=True)
    print(len(left), "left")


if __name__ == "__main__":
    main()
