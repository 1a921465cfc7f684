"""`capture.placement: streamed` against `whole`: the same bits with one decoder block in memory, however it is cut and interrupted."""

import shutil
from dataclasses import replace

import pytest
import torch
from capture_bits import assert_same_bits
from killed import Killed, killed_again_and_again
from shuffled import Shuffled
from tiny import FAMILIES, VOCABULARY, random_ids, tiny_workspace
from tiny_families import tiny_family

from fisherfold.inputs.targeting import open_experts
from fisherfold.network.layers import read_layers, write_layers
from fisherfold.network.streamed_model import StreamedModel, is_stand_in
from fisherfold.network.targets import find_targets
from fisherfold.run import disk, scratch, unit_work
from fisherfold.run.engine import use_engine
from fisherfold.run.errors import InputError, NumericalError
from fisherfold.run.group_writer import SUFFIX
from fisherfold.run.params import CaptureParams, PrepareParams
from fisherfold.run.scratch import Scratch
from fisherfold.run.tables import write_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics import streamed_pass
from stages import capture

SEQUENCES = 7
WHOLE = CaptureParams(
    batch_size=2, sequences_per_shard=2, gradients="sketch", sketch_rank=4, tokens_per_sequence=3, knowledge_questions=0
)
STREAMED = WHOLE.model_copy(update={"placement": "streamed"})
CUT = STREAMED.model_copy(update={"leaves": 3, "layers_per_pass": 3})


def family_workspace(root, family: str) -> Workspace:
    """As stage `prepare` leaves a family's tiny model, experts unfolded."""
    workspace = tiny_workspace(root, sequences=SEQUENCES)
    if family not in FAMILIES:
        model = tiny_family(family).eval().requires_grad_(False)
        with Scratch(workspace, "prepare", PrepareParams(), {}) as scratch, scratch.publish() as out:
            model.save_pretrained(out / "model", save_original_format=False)
            open_experts(model, "layers")
            write_layers(out, find_targets(model, random_ids(1, 12)).layers)
        return workspace
    shutil.rmtree(root)
    return tiny_workspace(root, family, SEQUENCES)


def captured(workspace: Workspace, root, params: CaptureParams) -> Workspace:
    """A copy of the workspace after stage `capture`."""
    shutil.copytree(workspace.root, root)
    capture.run(Workspace(root), params)
    return Workspace(root)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Workspace:
    return family_workspace(tmp_path_factory.mktemp("prepared") / "w", "llama")


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory) -> Workspace:
    """After a capture with the whole model."""
    return captured(prepared, tmp_path_factory.mktemp("whole") / "w", WHOLE)


@pytest.mark.parametrize(
    ("family", "labels"),
    [
        ("llama", "data"),
        ("qwen2", "model"),
        ("gemma3_text", "model"),
        ("gpt2", "data"),
        ("qwen3_moe", "data"),
        ("gpt_oss", "model"),
    ],
)
def test_the_same_bits_as_with_the_whole_model(tmp_path, family, labels):
    prepared = family_workspace(tmp_path / "prepared", family)
    one, other = (
        captured(prepared, tmp_path / name, params.model_copy(update={"labels": labels}))
        for name, params in (("whole", WHOLE), ("streamed", STREAMED))
    )
    assert_same_bits(other, one)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_of_several_draws_too(tmp_path, family):
    prepared = family_workspace(tmp_path / "prepared", family)
    one, other, few = (
        captured(prepared, tmp_path / name, params.model_copy(update={"draws": draws}))
        for name, params, draws in (("whole", WHOLE, 4), ("streamed", CUT, 4), ("few", CUT, 0))
    )
    assert_same_bits(other, one)
    assert_same_bits(few, one)


@pytest.mark.parametrize("changes", [{"leaves": 3}, {"leaves": 4, "layers_per_pass": 1}])
def test_however_it_is_cut(prepared, whole, tmp_path, changes):
    assert_same_bits(captured(prepared, tmp_path / "w", STREAMED.model_copy(update=changes)), whole)


def test_in_bfloat16_and_without_gradients(prepared, tmp_path):
    changes = {"dtype": "bfloat16", "gradients": "none", "tokens_per_sequence": 0}
    one, other = (
        captured(prepared, tmp_path / params.placement, params.model_copy(update=changes))
        for params in (WHOLE, STREAMED)
    )
    assert_same_bits(other, one)


@pytest.mark.parametrize("slots", [2, 3])
def test_units_in_any_order_give_the_same_bits(prepared, whole, tmp_path, slots):
    with use_engine(Shuffled(slots, seed=slots)):
        assert_same_bits(captured(prepared, tmp_path / "w", CUT), whole)


def test_layers_in_the_last_block_alone(prepared, tmp_path):
    """Blocks without a layer are gone through; the way back ends where the lowest layer is."""
    root = tmp_path / "prepared"
    shutil.copytree(prepared.root, root)
    workspace = Workspace(root)
    layers = [layer for layer in read_layers(prepared.out("prepare")) if layer.name.endswith("o_proj")]
    for chosen in (layers[1:], layers[:1]):
        with Scratch(workspace, "prepare", PrepareParams(seed=len(chosen)), {}) as scratch, scratch.publish() as out:
            shutil.copytree(prepared.model, out / "model")
            write_layers(out, chosen)
        one, other = (
            captured(workspace, tmp_path / f"{params.placement}-{chosen[0].name}", params)
            for params in (WHOLE, STREAMED)
        )
        assert_same_bits(other, one)


def test_killed_anywhere_it_resumes_with_the_same_bits(prepared, whole, tmp_path, monkeypatch):
    """Ends the run at the 1st, 10th, 19th … of its durable steps, each run going on from the one before."""
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    folders = (scratch, unit_work, disk)
    assert killed_again_and_again(lambda: capture.run(workspace, CUT), monkeypatch, 9, folders) > 10
    assert_same_bits(workspace, whole)


def test_killed_forward_at_the_turn_backward_and_between_leaves(prepared, whole, tmp_path, monkeypatch):
    """One run after the other, each going on from where the one before was killed: while a unit is made durable, or before it is listed."""
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace, finish = Workspace(tmp_path / "w"), unit_work.finish_unit
    points = [".forward-001", ".head", "pass-", ".embedded"]  # the last when the first leaf is done

    def deadly(attempt, folder):
        if points and points[0] in folder.name:
            points.pop(0)
            if len(points) % 2:
                finish(attempt, folder)
            raise Killed
        return finish(attempt, folder)

    monkeypatch.setattr(unit_work, "finish_unit", deadly)
    while points:
        with pytest.raises(Killed):
            capture.run(workspace, CUT)
    capture.run(workspace, CUT)
    assert_same_bits(workspace, whole)


def test_what_is_handed_on_goes_when_nobody_needs_it(prepared, tmp_path, monkeypatch):
    """Never more than K + 2 boundaries of one leaf, and none is left when the output is published."""
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace, held = Workspace(tmp_path / "w"), []

    def boundaries() -> int:
        found = [path for name in ("hidden", "gradient") for path in workspace.artifacts.rglob(f"{name}{SUFFIX}")]
        return len(found)

    free, publish = capture.PLACEMENTS.lookup("streamed").free, capture.Scratch.publish
    monkeypatch.setattr(
        capture.PLACEMENTS.lookup("streamed"), "free", lambda self, name: (held.append(boundaries()), free(self, name))
    )
    monkeypatch.setattr(capture.Scratch, "publish", lambda self: (held.append(boundaries()), publish(self))[1])
    capture.run(workspace, CUT)
    assert max(held) == 2 + 2 and held[-1] == 0


def test_no_more_than_one_block_has_weights(prepared, tmp_path, monkeypatch):
    """In every forward and backward pass: one block, or what lies around the blocks."""
    resident: list[set[str]] = []
    opened: list[StreamedModel] = []
    fill = StreamedModel.fill

    def watched(self, *arguments):
        opened.append(self)
        restore = fill(self, *arguments)
        resident.append(
            {n.split(".")[2] for n, p in self.model.named_parameters() if "layers" in n and not is_stand_in(p)}
        )
        return restore

    monkeypatch.setattr(StreamedModel, "fill", watched)
    captured(prepared, tmp_path / "w", STREAMED)
    assert {frozenset(names) for names in resident} == {frozenset(), frozenset("0"), frozenset("1")}
    assert all(map(is_stand_in, opened[0].model.parameters()))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3n_text", "block 'model.layers.0' alone gives something else"),
        ("falcon", "block 'transformer.h.0' returns more than hidden states"),
    ],
)
def test_a_model_whose_blocks_cannot_be_run_alone_is_refused(tmp_path, family, reason):
    workspace = family_workspace(tmp_path / "w", family)
    layers = read_layers_inside(workspace)
    with pytest.raises(InputError, match=reason):
        streamed_pass.require_blocks(StreamedModel(workspace.model, torch.float32), layers)


def read_layers_inside(workspace: Workspace) -> list:
    return [layer for layer in read_layers(workspace.out("prepare")) if "layers.0" in layer.name or "h.0" in layer.name]


def test_a_layer_outside_the_blocks_is_refused(prepared):
    layers = read_layers_inside(prepared)
    with pytest.raises(InputError, match="'lm_head' lies in none of its 2 decoder blocks"):
        streamed_pass.require_blocks(
            StreamedModel(prepared.model, torch.float32), [*layers, replace(layers[0], name="lm_head")]
        )


def test_what_it_cannot_do_is_refused(prepared, tmp_path):
    with pytest.raises(InputError, match=r"capture\.skip_nonfinite: false"):
        captured(prepared, tmp_path / "w", STREAMED.model_copy(update={"skip_nonfinite": True}))


def test_a_sequence_that_is_not_finite_is_named(prepared, tmp_path, monkeypatch):
    """A gradient that breaks in a block is found there."""
    read = streamed_pass._read

    def broken(group, numbers, device, draw=0):
        values = read(group, numbers, device, draw)
        if group.name == streamed_pass.GRADIENT and group.parent.name.endswith("head"):
            values[[number == 3 for number in numbers]] = torch.inf
        return values

    monkeypatch.setattr(streamed_pass, "_read", broken)
    with pytest.raises(NumericalError, match=r"sequence 3 .*the gradient that model\.layers\.1 hands down"):
        captured(prepared, tmp_path / "w", STREAMED)


def test_a_table_of_another_vocabulary_is_refused(prepared, tmp_path):
    shutil.copytree(prepared.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    ids = random_ids(SEQUENCES, 12).numpy()
    write_sequences(workspace.table("calibration"), ids, [["a"]] * SEQUENCES, VOCABULARY + 1)
    with pytest.raises(InputError, match="vocabulary of 97"):
        capture.run(workspace, STREAMED)
