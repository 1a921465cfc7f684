"""A stand-in for the stages: what a project's dvc.yaml runs writes outputs that depend on every declared dependency, so that
what drives the stages is tested without the seconds that real ones take.

STAND_IN_RAN names the file that gets a line for each stage that ran (default: `ran` in the project), and beside it one with
the suffix .spans gets ``begin`` and ``end`` of each. STAND_IN_PAUSE, such as ``capture=2.5``, makes one stage take its time; STAND_IN_FAIL
names one that fails.
"""

import stat
import subprocess
import sys
from pathlib import Path

from project import clone

SCRIPT = f"""#!{sys.executable}
import hashlib, json, os, pathlib, sys, time
from ruamel.yaml import YAML
name = sys.argv[-1]
if name == "check":
    pathlib.Path("artifacts").mkdir(exist_ok=True)
    sys.exit(not pathlib.Path("artifacts/checked.txt").write_text("checked"))
if "FISHERFOLD_PROGRESS" in os.environ:
    with open(os.environ["FISHERFOLD_PROGRESS"], "a") as counts:
        print(json.dumps({{"stage": name, "begins": True}}), file=counts)
stage = YAML(typ="safe").load(pathlib.Path("dvc.yaml"))["stages"][name]
params = YAML(typ="safe").load(pathlib.Path("params.yaml"))[name]
print(name + ": stands in", file=sys.stderr, flush=True)
if os.environ.get("STAND_IN_FAIL") == name:
    sys.exit(f"error: {{name}} fails, as asked")
ran = os.environ.get("STAND_IN_RAN", "ran")
with open(ran + ".spans", "a") as log:
    print("begin", file=log)
slow, _, seconds = os.environ.get("STAND_IN_PAUSE", "=0").partition("=")
if slow == name:
    time.sleep(float(seconds))
digest = hashlib.sha256(repr(sorted(params.items())).encode())
for dependency in sorted(stage["deps"]):
    path = pathlib.Path(dependency)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        digest.update(file.read_bytes() if file.is_file() else b"")
names = ["manifest.json", "model/weights", "model/README.md", "layers.json", "dense_layers.json", "prepare.json", "capture.json", "factorize.json"]
names += [f"{{table}}.parquet" for table in ("calibration", "tuning", "training", "evaluation", "questions", "answers")]
for out in stage.get("outs", []) + stage.get("metrics", []):
    path = pathlib.Path(out)
    for file in [path] if path.suffix else [path / name for name in names]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(digest.hexdigest())
if name == "ranks":
    import pyarrow as pa, pyarrow.parquet as pq
    row = {{"module": "model.layers.0.mlp.up_proj", "n": 4, "m": 4, "rank": 2, "stored_parameters": 12, "dense_parameters": 16}}
    pq.write_table(pa.Table.from_pylist([row | {{"storage": "pivoted"}}]), "artifacts/ranks/ranks.parquet")
if name == "evaluate":
    perplexity = 20 + int(digest.hexdigest()[:4], 16) / 1000
    size = {{f"{{what}}_{{model}}": 16 - 4 * (model == "compressed")
            for what in ("targeted_parameters", "model_parameters", "model_bytes") for model in ("dense", "compressed")}}
    metrics = {{"dense": {{"perplexity": 20.0, "knowledge_accuracy": 0.5}}, "size": size,
               "compressed": {{"perplexity": perplexity, "knowledge_accuracy": 0.25, "kl_to_dense": 0.5}}}}
    pathlib.Path("artifacts/evaluate/metrics.json").write_text(json.dumps(metrics, sort_keys=True))
with open(ran, "a") as log:
    print(name, file=log)
with open(ran + ".spans", "a") as log:
    print("end", file=log)
"""


def clone_with_stand_in(folder: Path) -> Path:
    """A fresh project, committed to git, whose stages are stood in for."""
    clone(folder)
    script = folder / "stand-in"
    script.write_text(SCRIPT)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    pipeline = folder / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("cmd: fisherfold", f"cmd: {script}"))
    author = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", folder, "add", "--all"], check=True)
    subprocess.run(["git", "-C", folder, *author, "commit", "--quiet", "--message=First"], check=True)
    return folder
