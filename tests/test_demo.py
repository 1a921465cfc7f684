"""The demo model once, for real but small: fetched, captured, compressed, measured, loaded without this project."""

import json
import sys

from project import clone, command

SMALL = (
    "prepare.calibration_sequences=8",
    "prepare.tuning_sequences=1",
    "prepare.training_sequences=4",
    "prepare.evaluation_sequences=4",
    "prepare.unseen_sequences=2",
    "prepare.question_count=24",
    "prepare.self_written=0.125",
    "prepare.free_text=0.125",
    "prepare.held_out_prompts=2",
    "prepare.answer_tokens=32",
    "capture.sequences_per_shard=4",
    "capture.tokens_per_sequence=4",
    "capture.knowledge_questions=2",
    "kronecker.dependence_draws=2",
    "factorize.refine.passes=1",
    "factorize.refine.min_steps=0",
    "evaluate.answer_tokens=8",
    *(
        f"{block}.threads=1"
        for block in (
            "prepare",
            "capture",
            "kronecker",
            "subspace",
            "ranks",
            "factorize.refine",
            "factorize.heal",
            "evaluate",
        )
    ),
)
GENERATE = """
import sys
sys.meta_path.insert(0, type("NoFisherfold", (), {"find_spec": staticmethod(
    lambda name, *rest: sys.exit("imported " + name) if name.split(".")[0] in ("fisherfold", "stages", "flows") else None)}))
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0]))
"""
RECOVERY = 1.8  # times the dense perplexity at ratio 0.2; the full demo run reaches about 1.2


def test_demo_model_is_compressed_and_answers(tmp_path):
    folder = clone(tmp_path / "project")
    overrides = [word for assignment in SMALL for word in ("--set", assignment)]
    home = {"PREFECT_HOME": str(tmp_path / "prefect")}
    result = command(folder, "fisherfold", "run", *overrides, environment=home)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder / "artifacts/evaluate/metrics.json").read_text())
    dense, compressed, size = metrics["dense"], metrics["compressed"], metrics["size"]
    assert size["targeted_parameters_compressed"] <= 0.8 * size["targeted_parameters_dense"]
    assert size["targeted_parameters_compressed"] > 0.799 * size["targeted_parameters_dense"]
    assert size["model_bytes_compressed"] < 0.9 * size["model_bytes_dense"]
    assert compressed["perplexity"] < RECOVERY * dense["perplexity"]
    assert {name: source["calibrated"] for name, source in metrics["by_source"].items()} == {
        "electronic-texts": False,
        "wikipedia-leads": True,
    }
    assert dense["knowledge_accuracy"] > 0.4  # chance is 0.25
    assert 0 < compressed["kl_to_dense"] < 1.5
    spoken = command(tmp_path, sys.executable, "-c", GENERATE, str(folder / "artifacts/factorize/model"))
    assert "Paris" in spoken.stdout, spoken.stdout + spoken.stderr
