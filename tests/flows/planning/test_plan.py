"""The plan against what it plans: counted operations, written files, a recorded run."""

import json
from functools import reduce
from pathlib import Path

import pytest
import tiny
import torch
from project import ROOT
from ruamel.yaml import YAML
from tiny_families import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from fisherfold.linalg.gram import add_gram
from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import find_layers, write_layers
from fisherfold.run.errors import InputError, ParameterError
from fisherfold.run.params import (
    STAGES,
    CaptureParams,
    HealParams,
    KroneckerParams,
    Params,
    PrepareParams,
    RefineParams,
    SubspaceParams,
    load_params,
)
from fisherfold.run.scratch import Scratch
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.stored_sums import sum_shapes
from fisherfold.statistics.streamed_placement import Streamed
from flows.cli import main
from flows.planning import demand, group_shapes
from flows.planning.plan import StagePlan, disk_needed, plan_run, plan_stage, read_hardware, total
from flows.planning.proposal import command, incurable, propose, unfit
from flows.planning.shapes import find_shapes, shapes_of
from flows.planning.stage_costs import STAGE_COSTS
from stages import capture, kronecker, subspace

HERE = Workspace(ROOT)
DEMO = json.loads((ROOT / "tests" / "support" / "demo_run.json").read_text())
LARGE = {"prepare": {"dtype": "bfloat16", "sequence_length": 2048, "calibration_sequences": 128}}


@pytest.fixture(scope="module")
def demo_shapes():
    return find_shapes(HERE, "smollm2-135m-instruct")


@pytest.fixture(scope="module")
def llama():
    return find_shapes(HERE, "llama-7b")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_of_a_configuration_are_those_of_the_model(family, tmp_path):
    model = tiny.tiny_model(family)
    model.config.save_pretrained(tmp_path)
    shapes = find_shapes(HERE, str(tmp_path))
    assert shapes.layers == tuple(find_layers(model))
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (shapes.vocabulary, shapes.hidden) == tuple(model.get_output_embeddings().weight.shape)


def test_shapes_that_come_with_the_project(demo_shapes, llama):
    assert (demo_shapes.parameters, demo_shapes.targeted) == (134_515_008, 106_168_320)
    assert (llama.parameters, len(llama.layers)) == (6_738_415_616, 224)
    with pytest.raises(InputError, match="llama-70b, llama-7b, smollm2"):
        find_shapes(HERE, "lama-7b")


def test_shapes_of_what_is_prepared(tmp_path):
    workspace = tiny.tiny_workspace(tmp_path)
    (workspace.out("prepare") / "prepare.json").write_text(json.dumps({"model": {"name": "OWN/MODEL"}}))
    assert find_shapes(workspace, "OWN/MODEL").layers == tuple(find_layers(tiny.tiny_model()))
    some = find_layers(tiny.tiny_model())[2:]
    write_layers(workspace.out("prepare"), some)  # the others stay dense, stage prepare found
    assert find_shapes(workspace, "OWN/MODEL").layers == tuple(some)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_operations_are_those_that_torch_counts(family):
    model = tiny.tiny_model(family).requires_grad_(False)
    model.set_attn_implementation("eager")
    shapes, ids = shapes_of(family, model.config), tiny.random_ids(3, 12)
    with FlopCounterMode(display=False) as forward:
        model(input_ids=ids, use_cache=False)
    assert forward.get_total_flops() == pytest.approx(demand.forward_operations(shapes, 36, 12), rel=1e-9)
    with FlopCounterMode(display=False) as both:
        gradient_pass(model, ids)
    assert both.get_total_flops() == pytest.approx(demand.pass_operations(shapes, 36, 12), rel=1e-9)


@pytest.mark.parametrize(("tokens", "size"), [(50, 64), (50, 576), (20, 1536)])
def test_operations_of_a_gram(tokens, size, monkeypatch):
    counted = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda total, a, b: counted.append(2 * a.numel() * b.shape[1]))
    add_gram(torch.zeros(size, size), torch.randn(tokens, size))
    assert sum(counted) == pytest.approx(demand.gram_operations(tokens, size), rel=1e-9)


STREAMED = {"placement": "streamed", "knowledge_questions": 0}


def _groups(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.zarr.zip"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradients": "exact"},
        {"gradients": "none"},
        {"tokens_per_sequence": 0},
        {"layers_per_pass": 3},
        {"leaves": 2},
        {"gradients": "sums"},
        STREAMED,
        STREAMED | {"layers_per_pass": 3, "leaves": 2},
    ],
    ids=str,
)
def test_bytes_of_every_group_are_exact(tmp_path, changes):
    workspace = tiny.tiny_workspace(tmp_path)
    params = Params(
        prepare=PrepareParams(calibration_sequences=8, sequence_length=12),
        capture=CaptureParams(
            **{"sequences_per_shard": 3, "gradients": "sketch", "sketch_rank": 4, "threads": 1, **changes}
        ),
        kronecker=KroneckerParams(
            estimator="kfac" if changes.get("gradients") in ("none", "sums") else "sequence", threads=1
        ),
        subspace=SubspaceParams(threads=1),
    )
    shapes = find_shapes(workspace, str(workspace.model))
    for stage, module in (("capture", capture), ("kronecker", kronecker), ("subspace", subspace)):
        module.run(workspace, getattr(params, stage))
        assert _groups(workspace.out(stage)) == STAGE_COSTS.lookup(stage)(shapes, params, 1).published


@pytest.mark.parametrize(
    "changes", [{}, {"leaves": 2}, {"layers_per_pass": 2, "tokens_per_sequence": 0}, {"draws": 3}, {"draws": 0}], ids=str
)
def test_a_streamed_capture_takes_the_disk_that_the_plan_says(tmp_path, monkeypatch, changes):
    workspace = tiny.tiny_workspace(tmp_path, length=48)
    params = Params(
        prepare=PrepareParams(calibration_sequences=8, sequence_length=48),
        capture=CaptureParams(**STREAMED, **{"sequences_per_shard": 3, "threads": 1, **changes}),
    )
    taken = [0]

    def look() -> None:
        files = {path.stat().st_ino: path.stat().st_size for path in workspace.artifacts.rglob("*.zarr.zip")}
        taken.append(sum(files.values()))

    for kind, step in ((Streamed, "free"), (Scratch, "_link_output")):  # before anything goes, and once all is gathered
        does = getattr(kind, step)
        monkeypatch.setattr(kind, step, lambda *given, does=does: (look(), does(*given))[1])
    capture.run(workspace, params.capture)
    planned = plan_stage("capture", find_shapes(workspace, str(workspace.model)), params, read_hardware(HERE, "cpu"), 1)
    assert max(taken) == pytest.approx(planned.disk, rel=0.15)


def test_the_recorded_demo_run_was_foreseen(demo_shapes):
    params = load_params(ROOT / "params.yaml")
    recorded = {  # what has changed since among the defaults
        "prepare": {
            "calibration_sequences": 48,
            "training_sequences": 0,
            "self_written": 0.0,
            "free_text": 0.0,
            "held_out_prompts": 0,
        },
        "capture": DEMO["capture"] | {"tokens_per_sequence": 16},
        "subspace": {
            "input_damping": "ledoit_wolf",
            "output_damping": "ledoit_wolf",
        },  # roots were made of eigenvectors
        "factorize": {"refine": RefineParams(passes=0), "heal": HealParams(passes=0)},
    }
    params = params.model_copy(
        update={block: getattr(params, block).model_copy(update=values) for block, values in recorded.items()}
    )
    plans = {one.stage: one for one in plan_run(demo_shapes, params, read_hardware(HERE, "cpu"), 1)}
    assert tuple(plans) == STAGES
    for stage in DEMO["seconds"].keys() - DEMO["outdated"].keys():
        seconds = DEMO["seconds"][stage]
        assert 0.5 < plans[stage].seconds / seconds < 2, (stage, plans[stage].seconds, seconds)
    files, capture = DEMO["files"], params.capture
    length, rows = params.prepare.sequence_length, capture.sequences_per_shard
    kept = group_shapes.kept_bytes(demo_shapes.layers, capture, rows, length)
    assert kept == files["capture/gradients/shard-00000.zarr.zip"]
    assert plans["capture"].published == 6 * kept + group_shapes.group_bytes(sum_shapes(demo_shapes.layers, True))
    assert plans["subspace"].published == pytest.approx(
        files["subspace/bases.zarr.zip"], rel=1e-4
    )  # gathered in one file then
    assert plans["prepare"].published == pytest.approx(files["prepare/model/model.safetensors"], rel=1e-4)
    assert plans["factorize"].published == pytest.approx(files["factorize/model/model.safetensors"], rel=2e-3)
    assert (
        disk_needed(list(plans.values())) < 0.8 * DEMO["peak_artifacts"]
    )  # half of the sums is stored since, and parts of them never


def test_healing_is_planned(demo_shapes):
    params = load_params(ROOT / "params.yaml")

    def planned(passes: int, fresh: int) -> dict[str, StagePlan]:
        factorize = params.factorize.model_copy(update={"heal": HealParams(passes=passes)})
        prepare = params.prepare.model_copy(update={"training_sequences": fresh})
        given = params.model_copy(update={"factorize": factorize, "prepare": prepare})
        return {plan.stage: plan for plan in plan_run(demo_shapes, given, read_hardware(HERE, "cpu"), 1)}

    plans = [planned(0, 0), planned(1, 0), planned(0, 1024), planned(1, 1024)]
    refining, once, refining_more, both = (plan["factorize"].seconds for plan in plans)
    assert both - refining_more == pytest.approx((once - refining) * (512 + 16) / (256 + 16), rel=0.05)
    assert refining_more > 2 * refining  # blocks of three times the text
    assert plans[3]["prepare"].seconds > plans[1]["prepare"].seconds  # the model writes two fifths of it
    assert plans[1]["factorize"].memory > plans[0]["factorize"].memory


def test_more_devices_are_never_much_slower_and_the_limit_is_named(llama):
    params, hardware = Params.model_validate(LARGE), read_hardware(HERE, "h100")
    times = {}
    for devices in (4, 32):
        plans = plan_run(llama, params, hardware, devices)
        assert all(one.limit for one in plans)
        times[devices] = {one.stage: one.seconds for one in plans}
    assert times[32]["subspace"] < times[4]["subspace"] / 4
    # more workers share the store when they load the model, which tells in evaluate: eight short units
    assert all(times[32][stage] <= 2 * times[4][stage] for stage in STAGES)
    alone = plan_stage("capture", llama, params, hardware, 32)
    many = params.model_copy(update={"capture": CaptureParams(leaves=16)})
    assert alone.units == 1 and alone.limit == "1 units over 16 workers"
    shared = plan_stage("capture", llama, many, hardware, 32)
    assert shared.seconds < 0.7 * alone.seconds and "writing" in shared.limit  # the sums of sixteen leaves


def test_what_does_not_fit_is_said_and_slices_make_it_fit(llama):
    hardware = read_hardware(HERE, "h100")
    params = Params.model_validate({**LARGE, "capture": {"dtype": "bfloat16"}})
    whole = plan_stage("capture", llama, params, hardware, 1)
    assert whole.seconds is None and "layers_per_pass" in whole.limit and whole.devices > 1
    sliced = params.model_copy(update={"capture": CaptureParams(dtype="bfloat16", layers_per_pass=56)})
    fits = plan_stage("capture", llama, sliced, hardware, 1)
    assert fits.seconds > 0 and fits.devices == 1
    proposed = propose(llama, params, hardware, 1, [whole])
    assert plan_stage("capture", llama, changed(params, proposed), hardware, 1).seconds > 0
    assert propose(llama, params, hardware, 1, [fits]) == []
    assert command(["a.b=1"], 4, on_gpus=True) == "fisherfold run --engine ray --num-gpus 1 --set a.b=1"


def changed(params: Params, assignments: list[str]) -> Params:
    """The parameters with assignments, as `--set` would read them."""
    document = params.model_dump()
    for name, _, value in (one.partition("=") for one in assignments):
        *blocks, key = name.split(".")
        reduce(dict.__getitem__, blocks, document)[key] = YAML(typ="safe").load(value)
    return Params.model_validate(document)


@pytest.mark.parametrize("memory", [8e8, 5e8])
def test_less_memory_than_the_model_takes_is_for_one_block_at_a_time(memory):
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16, "num_hidden_layers": 4}
    shapes = shapes_of("0.3 B", AutoConfig.for_model("llama", **sizes))
    hardware = read_hardware(HERE, "cpu").model_copy(update={"memory": memory})
    capture = {"dtype": "bfloat16", "tokens_per_sequence": 0, "sequences_per_shard": 128}
    params = Params.model_validate({"prepare": {"calibration_sequences": 2048}, "capture": capture})
    stages = plan_run(shapes, params, hardware, 1)
    proposed = propose(shapes, params, hardware, 1, stages)
    assert "capture.placement=streamed" in proposed and "factorize.heal.passes=0" in proposed
    fits = plan_stage("capture", shapes, changed(params, proposed), hardware, 1)
    assert fits.seconds > 0 and fits.memory <= 0.9 * memory
    lost = incurable(shapes, params, hardware, 1, stages)
    assert {"evaluate", "prepare"} <= {*unfit(stages)}  # which hold models
    assert ("evaluate" in lost) == (memory < 6e8) and "prepare" not in lost  # for its logits
    others = [plan for plan in plan_run(shapes, changed(params, proposed), hardware, 1) if plan.stage not in lost]
    assert unfit(others) == []
    tight = propose(shapes, params, hardware, 1, stages, disk=0.9 * fits.disk)
    less = plan_stage("capture", shapes, changed(params, tight), hardware, 1)
    assert less.disk <= 0.9 * fits.disk and any(one.startswith("capture.leaves=") for one in tight)
    assert propose(shapes, params, hardware, 1, stages, disk=1e6) is None
    hopeless = hardware.model_copy(update={"memory": 1e8})
    assert propose(shapes, params, hopeless, 1, stages) is None


def test_on_the_command_line(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    asked = ["plan", "--model", "smollm2-135m-instruct", "--gpus", "1,2", "--set", "capture.gradients=none"]
    before = (ROOT / "params.yaml").read_bytes()
    assert main([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["plans"]) == {"1", "2"} and document["plans"]["1"]["seconds"] > 0
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "limit" in shown and all(stage in shown for stage in STAGES)
    assert max(map(len, shown.splitlines())) <= 80
    assert "1 x cpu: fisherfold run --set capture.gradients=none\n" in shown
    assert "2 x cpu: fisherfold run --engine ray --set capture.gradients=none\n" in shown
    assert (ROOT / "params.yaml").read_bytes() == before
    assert main(["plan", "--gpus", "0"]) == 2 and main(["plan", "--gpu", "abacus"]) == 2
    with pytest.raises(ParameterError, match="cpu, a100, h100"):
        read_hardware(HERE, "abacus")


def test_a_plan_needs_no_network_and_no_weights(tmp_path, monkeypatch):
    config = AutoConfig.for_model("llama", hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a plan went to the network"))
    shapes = find_shapes(HERE, str(tmp_path))
    assert total(plan_run(shapes, Params(), read_hardware(HERE, "cpu"), 1)) > 0


@pytest.mark.parametrize("family", ["mamba2", "recurrent_gemma", "nemotron_h", "whisper", "rwkv"])
def test_other_architectures_are_planned(family):
    shapes = shapes_of(family, tiny_config(family))
    assert shapes.layers and shapes.block_sizes
    assert total(plan_run(shapes, Params(), read_hardware(HERE, "cpu"), 1)) > 0


def test_a_configuration_that_says_nothing_is_named(tmp_path):
    for text in ("{}", "[]", '{"model_type": "llama", "num_attention_heads": 0}', '{"model_type": "vit"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"no folder with a config.json"):
            find_shapes(HERE, str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe"])
def test_a_mixture_is_planned_and_what_of_it_a_token_meets(family, dtype):
    config = tiny_config(family)
    config.dtype = dtype
    shapes = shapes_of("mixture", config)
    experts = [layer for layer in shapes.layers if layer.stack]
    assert len(experts) == 2 * 2 * 4 and all(shapes.seen(layer) == 0.5 for layer in experts)
    assert shapes.active == shapes.parameters - sum(layer.dense_numbers for layer in experts) // 2
    stages = plan_run(shapes, Params(), read_hardware(HERE, "h100"), 1)
    assert next(stage.units for stage in stages if stage.stage == "subspace") < len(shapes.layers)
