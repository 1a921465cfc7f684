import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from capture_bits import assert_same_bits, groups
from killed import Killed, killed_again_and_again
from project import ROOT
from safetensors.torch import load_file, save_file
from shuffled import Shuffled
from tiny import VOCABULARY, random_ids, tiny_workspace

from fisherfold.network.models import load_model
from fisherfold.run import disk, savepoints, scratch, unit_work
from fisherfold.run.engine import use_engine
from fisherfold.run.errors import CorruptArtifact, InputError, NotEnoughDisk, NumericalError, ParameterError
from fisherfold.run.files import read_manifest, verify_output
from fisherfold.run.group_writer import SUFFIX, group_file
from fisherfold.run.params import CaptureParams
from fisherfold.run.store import array_names, read_array
from fisherfold.run.tables import write_sequences
from fisherfold.run.workspace import Workspace
from fisherfold.statistics import kept, leaf, shard
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.placement import disk_bytes, sums_bytes
from fisherfold.statistics.token_sample import sample_positions
from stages import capture

SEQUENCES = 7
PARAMS = CaptureParams(
    products="float32",
    batch_size=2,
    sequences_per_shard=2,
    labels="data",
    gradients="sketch",
    sketch_rank=4,
    tokens_per_sequence=3,
    knowledge_questions=0,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Workspace:
    """A llama's workspace after stage `prepare`."""
    return tiny_workspace(tmp_path_factory.mktemp("prepared"), "llama", SEQUENCES)


@pytest.fixture
def workspace(prepared, tmp_path) -> Workspace:
    shutil.copytree(prepared.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


@pytest.fixture(scope="module")
def captured(prepared, tmp_path_factory) -> Workspace:
    """The same after an uninterrupted `capture` with PARAMS."""
    root = tmp_path_factory.mktemp("captured") / "w"
    shutil.copytree(prepared.root, root)
    capture.run(Workspace(root), PARAMS)
    return Workspace(root)


def statistics_of(workspace: Workspace, **changes) -> dict[str, torch.Tensor]:
    """All sums after a run with PARAMS changed."""
    capture.run(workspace, PARAMS.model_copy(update=changes))
    return sums_in(workspace)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6 * values.abs().max().item(), msg=name)


def test_publishes_what_the_reader_reads(captured):
    verify_output(captured.out("capture"))
    statistics = Statistics(captured.out("capture"))
    assert statistics.sequences == SEQUENCES and statistics.tokens == SEQUENCES * 12
    assert statistics.facts["shards"] == [f"shard-{i:05d}" for i in range(4)]
    assert statistics.facts["skipped"] == statistics.facts["unreached"] == []
    for layer in statistics.layers:
        n, m = layer.outputs, layer.inputs
        shards = list(statistics.gradient_shards(layer))
        assert [len(left) for left, _ in shards] == [2, 2, 2, 1]
        assert all(left.shape[1:] == (n, 4) and right.shape[1:] == (m, 4) for left, right in shards)
        assert statistics.input_covariance(layer).shape == (m, m) and statistics.input_magnitude(layer).shape == (m,)
        assert statistics.output_covariance(layer).shape == (n, n)
        assert statistics.gradient_sum(layer).shape == (n, m)
        assert statistics.fisher_inputs(layer).shape == (m,) and statistics.fisher_outputs(layer).shape == (n,)
        norms = statistics.gradient_norms(layer)
        torch.testing.assert_close(norms.sum(), statistics.fisher_inputs(layer).sum())
        torch.testing.assert_close(norms.sum(), statistics.fisher_outputs(layer).sum())
        kept = torch.cat([(left @ right.mT).square().sum((1, 2)) for left, right in shards]) / norms
        torch.testing.assert_close(statistics.energy_kept(layer), kept, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_models_own(captured):
    model = load_model(captured.model, torch.float32)
    losses = [model(input_ids=ids[None], labels=ids[None]).loss for ids in random_ids(SEQUENCES, 12)]
    assert Statistics(captured.out("capture")).facts["loss"] == pytest.approx(
        torch.stack(losses).mean().item(), rel=1e-5
    )


def sums_in(workspace: Workspace) -> dict[str, torch.Tensor]:
    folder = workspace.out("capture") / "statistics"
    return {name: read_array(folder, name) for name in array_names(folder)}


def test_sharded_equals_unsharded(workspace, captured):
    assert_near(statistics_of(workspace, sequences_per_shard=100), sums_in(captured))


def test_rounded_products_change_no_sum_by_much(workspace, captured):
    found, expected = statistics_of(workspace, products="bfloat16"), sums_in(captured)
    for name, values in expected.items():
        assert (found[name] - values).norm() <= 0.02 * values.norm(), name


def test_one_sequence_a_shard_equals_many_and_leaves_no_file_open(workspace, captured, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", "0")
    before = removed_files_open()  # of other tests
    assert_near(statistics_of(workspace, sequences_per_shard=1, batch_size=8), sums_in(captured))
    assert not removed_files_open() - before  # an open file keeps its disk though it is removed


def removed_files_open() -> set[str]:
    return {link for link in open_files() if "(deleted)" in link}


def open_files() -> list[str]:
    """What this process has open under artifacts (where the system tells)."""
    here = Path("/proc/self/fd")
    links = [os.readlink(link) for link in here.iterdir() if link.is_symlink()] if here.exists() else []
    return [link for link in links if "artifacts" in link]


def test_leaves_add_up_to_the_same_sums_and_free_their_disk(workspace, captured, monkeypatch):
    held, drop = [], capture.Scratch.drop

    def watched(run, *arguments):
        held.append(len(list(run.units.glob(f"*/statistics{SUFFIX}"))))
        drop(run, *arguments)

    monkeypatch.setattr(capture.Scratch, "drop", watched)
    assert_near(statistics_of(workspace, leaves=3), sums_in(captured))
    assert held == [4, 3, 2]  # three leaves and their sum
    assert tokens_of(workspace).keys() == tokens_of(captured).keys()


def test_layers_in_several_passes_give_the_same_bits(workspace, captured):
    statistics_of(workspace, layers_per_pass=5)
    assert_same_bits(workspace, captured)


@pytest.mark.parametrize("gradients", ["none", "sums", "exact"])
def test_other_forms_of_gradients(workspace, captured, gradients):
    found, sketched = statistics_of(workspace, gradients=gradients), sums_in(captured)
    assert all(torch.equal(values, sketched[name]) for name, values in found.items())
    reader = Statistics(workspace.out("capture"))
    layer = reader.layers[0]
    assert_formula_counts(workspace, gradients)
    assert reader.has_gradients == (gradients != "none") and reader.has_tokens
    assert reader.has_sequence_gradients == (gradients == "exact")
    if gradients == "sums":
        assert torch.equal(reader.gradient_norms(layer), Statistics(captured.out("capture")).gradient_norms(layer))
    if gradients != "exact":
        with pytest.raises(InputError, match=rf"capture\.gradients is '{gradients}'. Set it to 'sketch' or 'exact'"):
            list(reader.gradient_shards(layer))
    else:
        G = torch.cat([gradient for (gradient,) in reader.gradient_shards(layer)])
        torch.testing.assert_close(G.sum(0), reader.gradient_sum(layer))
        assert torch.equal(reader.gradient_norms(layer), Statistics(captured.out("capture")).gradient_norms(layer))
        assert (reader.energy_kept(layer) == 1).all()


def assert_formula_counts(workspace: Workspace, gradients: str, tokens: int = PARAMS.tokens_per_sequence) -> None:
    """The disk that was asked for is that of all stored numbers, the sums' as often as parts of them may wait."""
    out = workspace.out("capture")
    of_sums, of_gradients = (
        sum(read_array(folder, name).nbytes for folder in folders for name in array_names(folder))
        for folders in (groups(workspace)[:1], groups(workspace)[1:])
    )
    params = PARAMS.model_copy(update={"gradients": gradients, "tokens_per_sequence": tokens})
    assert disk_bytes(Statistics(out).layers, params, SEQUENCES) == of_gradients + 2 * of_sums


def test_without_gradients_and_tokens_nothing_is_kept_of_a_sequence(workspace):
    statistics_of(workspace, gradients="none", tokens_per_sequence=0)
    reader = Statistics(workspace.out("capture"))
    assert reader.facts["shards"] == [] and not (workspace.out("capture") / "gradients").exists()
    with pytest.raises(InputError, match=r"capture\.tokens_per_sequence is 0"):
        list(reader.token_shards(reader.layers[0]))
    assert_formula_counts(workspace, "none", tokens=0)


def tokens_of(workspace: Workspace) -> dict[str, tuple[torch.Tensor, ...]]:
    """x [S, t, m], d [S, t, n] and positions [S, t] by layer."""
    reader = Statistics(workspace.out("capture"))
    return {layer.name: tuple(map(torch.cat, zip(*reader.token_shards(layer)))) for layer in reader.layers}


def test_tokens_equal_those_of_a_pass_by_hand(workspace):
    capture.run(workspace, PARAMS.model_copy(update={"token_dtype": "float32"}))
    model, seen = load_model(workspace.model, torch.float32), {}
    modules = dict(model.named_modules())

    def note(name):
        def hook(module, arguments, output):
            output.retain_grad() if output.requires_grad else output.requires_grad_()
            seen.setdefault(name, []).append((arguments[0].detach(), output))

        return hook

    found = tokens_of(workspace)
    for name in found:
        modules[name].register_forward_hook(note(name))
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    for ids in random_ids(SEQUENCES, 12):
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
    for name, (x, d, positions) in found.items():
        assert (positions.diff() > 0).all() and positions.shape == (SEQUENCES, 3)
        for s, (inputs, output) in enumerate(seen[name]):
            torch.testing.assert_close(x[s], inputs[0, positions[s]], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(d[s], output.grad[0, positions[s]], rtol=1e-3, atol=1e-7)


def test_sampled_tokens_depend_on_nothing_but_the_seed(workspace, captured):
    statistics_of(workspace, sequences_per_shard=100, batch_size=1, layers_per_pass=4)
    expected = tokens_of(captured)
    for name, arrays in tokens_of(workspace).items():
        for values, other in zip(arrays, expected[name]):
            torch.testing.assert_close(values, other, rtol=0.02, atol=1e-4 * other.abs().max().item())
        assert torch.equal(arrays[2], expected[name][2])
    statistics_of(workspace, seed=1)
    positions = next(iter(tokens_of(workspace).values()))[2]
    assert not torch.equal(positions, next(iter(expected.values()))[2])


def test_all_tokens_are_kept_if_that_many_are_asked_for(workspace):
    statistics_of(workspace, tokens_per_sequence=99, token_dtype="float32")
    reader = Statistics(workspace.out("capture"))
    for layer in reader.layers:
        x, d, positions = tokens_of(workspace)[layer.name]
        assert torch.equal(positions, torch.arange(12).expand(SEQUENCES, 12))
        sums = torch.einsum("stn,stm->nm", d, x), torch.einsum("stn,sto->no", d, d), torch.einsum("stn,sto->no", x, x)
        expected = reader.gradient_sum(layer), reader.output_gram(layer), reader.input_gram(layer)
        for values, total in zip(sums, expected):
            torch.testing.assert_close(values, total, rtol=1e-4, atol=1e-6 * total.abs().max().item())


def test_disk_formula_counts_every_number(captured):
    assert_formula_counts(captured, "sketch")
    layers = Statistics(captured.out("capture")).layers
    sums, more = sums_bytes(layers, PARAMS), disk_bytes(layers, PARAMS, SEQUENCES)
    of_leaves = {"leaves": 3}, {"leaves": 9}, {"layers_per_pass": 4}
    found = [disk_bytes(layers, PARAMS.model_copy(update=changes), SEQUENCES) - more for changes in of_leaves]
    assert found[:2] == [3 * sums, 4 * sums]  # 4 shards
    assert -sums < found[2] < 0  # savepoints of one slice at a time
    assert disk_bytes(layers, PARAMS, SEQUENCES, at_once=2) == more + sums


def test_gradients_are_written_before_memory_fills(workspace, captured, monkeypatch):
    monkeypatch.setattr(kept, "HELD_BYTES", 1)
    capture.run(workspace, PARAMS.model_copy(update={"sequences_per_shard": 100}))
    whole, parts = Statistics(workspace.out("capture")), Statistics(captured.out("capture"))
    for layer in whole.layers:
        ((left, _),) = whole.gradient_shards(layer)
        assert torch.equal(left, torch.cat([left for left, _ in parts.gradient_shards(layer)]))


@pytest.fixture(scope="module")
def in_leaves(prepared, tmp_path_factory) -> Workspace:
    """After an uninterrupted `capture` in leaves, one after the other."""
    root = tmp_path_factory.mktemp("in-leaves") / "w"
    shutil.copytree(prepared.root, root)
    capture.run(Workspace(root), LEAVES)
    return Workspace(root)


LEAVES = PARAMS.model_copy(update={"leaves": 3, "layers_per_pass": 8})


@pytest.mark.parametrize("slots", [2, 3])
def test_leaves_in_any_order_give_the_same_bits(workspace, in_leaves, slots):
    engine = Shuffled(slots, seed=slots)
    with use_engine(engine):
        capture.run(workspace, LEAVES)
    assert_same_bits(workspace, in_leaves)
    assert len(engine.given_out) == len(set(engine.given_out)) > 2


@pytest.mark.parametrize("seconds", ["0", "1e9"])
def test_killed_anywhere_it_resumes_with_the_same_bits(workspace, in_leaves, monkeypatch, seconds):
    """Ends the run at the 1st, 4th, 7th … of its durable steps, each run going on from the one before."""
    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", seconds)
    folders, trees = (disk, scratch, savepoints, unit_work), (savepoints, unit_work)
    assert killed_again_and_again(lambda: capture.run(workspace, LEAVES), monkeypatch, 3, folders, trees) > 5
    assert_same_bits(workspace, in_leaves)


def test_a_savepoint_is_gone_on_from_and_changes_no_bit(workspace, captured, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", "0")
    add, added = leaf.add_shard, []

    def killed_in_the_last(sums, folder, *arguments):
        if len(added) == 3:
            raise Killed
        added.append(folder.name)
        return add(sums, folder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(leaf, "add_shard", killed_in_the_last)
        with pytest.raises(Killed):
            capture.run(workspace, PARAMS)
    states = workspace.artifacts.glob("capture.partial/*/savepoints/*/*")
    assert [state.name for state in states] == ["00000003"]  # the newest alone

    def noted(sums, folder, *arguments):
        added.append(folder.name)
        return add(sums, folder, *arguments)

    monkeypatch.setattr(leaf, "add_shard", noted)
    capture.run(workspace, PARAMS)
    assert added == [f"shard-{i:05d}" for i in range(4)]
    assert_same_bits(workspace, captured)
    assert read_manifest(workspace.out("capture")) == read_manifest(captured.out("capture"))
    assert not list(workspace.artifacts.glob("capture.partial/*/savepoints"))


def test_seconds_between_savepoints_are_checked(workspace, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_SAVE_SECONDS", "soon")
    with pytest.raises(ParameterError, match="FISHERFOLD_SAVE_SECONDS='soon'"):
        capture.run(workspace, PARAMS)


KILLED = """
import itertools, os, signal, sys
from pathlib import Path
from stages import capture
from fisherfold.run import group_writer
from fisherfold.run.params import CaptureParams
from fisherfold.run.workspace import Workspace
calls, write = itertools.count(1), group_writer.ChunkWriter._write
def deadly(*arguments):
    if next(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
group_writer.ChunkWriter._write = deadly
capture.run(Workspace(Path(sys.argv[1])), CaptureParams.model_validate_json(sys.argv[2]))
"""


def test_killed_by_a_signal_in_a_later_shard_it_resumes_with_the_same_bits(workspace, captured):
    arguments = [str(workspace.root), PARAMS.model_dump_json(), "400"]
    environment = {**os.environ, "FISHERFOLD_SAVE_SECONDS": "0"}
    command = [sys.executable, "-c", KILLED, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    states = workspace.artifacts.glob("capture.partial/*/savepoints/*/*")
    assert [state.name for state in states if state.name.isdigit()] and not workspace.out("capture").exists()
    capture.run(workspace, PARAMS)
    assert_same_bits(workspace, captured)
    assert read_manifest(workspace.out("capture")) == read_manifest(captured.out("capture"))


def test_refuses_a_full_disk_before_it_starts(workspace, monkeypatch):
    usage = namedtuple("Usage", "total used free")(10**6, 10**6, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NotEnoughDisk, match=r"needs \d+ bytes"):
        capture.run(workspace, PARAMS)


def poison(workspace: Workspace, sequences: list[int]) -> torch.Tensor:
    """Give token 7 an embedding that is not finite, and put it into some calibration sequences; the ids [S, T]."""
    path = workspace.model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][7] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    ids = random_ids(SEQUENCES, 12).clamp(min=10)
    ids[sequences, 5] = 7
    write_table(workspace, ids)
    return ids


def write_table(workspace: Workspace, ids: torch.Tensor) -> None:
    articles = [[f"calibration-{s}"] for s in range(len(ids))]
    write_sequences(workspace.table("calibration"), ids.numpy(), articles, VOCABULARY)


@pytest.fixture
def poisoned(tmp_path, monkeypatch) -> Workspace:
    """Of a model whose weights are not looked at when it is loaded, so that only a pass shows what is wrong."""
    monkeypatch.setattr(shard, "check_weights", lambda model: None)
    return tiny_workspace(tmp_path, "qwen2", SEQUENCES)


def test_a_sequence_that_is_not_finite_is_named(poisoned):
    poison(poisoned, [5])
    with pytest.raises(
        NumericalError, match=r"sequence 5 \(articles 'calibration-5'\).*model\.layers\.0\.self_attn.q_proj"
    ):
        capture.run(poisoned, PARAMS)


def test_sequences_that_are_not_finite_are_left_out_entirely(poisoned):
    ids = poison(poisoned, [1, 4, 5])
    found = statistics_of(poisoned, skip_nonfinite=True)
    facts = Statistics(poisoned.out("capture")).facts
    assert [skipped["sequence"] for skipped in facts["skipped"]] == [1, 4, 5]
    assert facts["sequences"] == 4 and facts["tokens"] == 4 * 12 and facts["loss"] < 10
    assert facts["shards"] == ["shard-00000", "shard-00001", "shard-00003"]
    positions = next(iter(tokens_of(poisoned).values()))[2]
    assert torch.equal(positions, sample_positions([0, 2, 3, 6], 12, 3, PARAMS.seed))
    write_table(poisoned, ids[[0, 2, 3, 6]])
    assert_near(statistics_of(poisoned), found)


def test_nothing_finite_is_an_error(poisoned):
    poison(poisoned, list(range(SEQUENCES)))
    with pytest.raises(NumericalError, match="none of 7 sequences is finite"):
        capture.run(poisoned, PARAMS.model_copy(update={"skip_nonfinite": True}))


def test_a_gradient_that_is_not_finite_is_found_where_it_starts(workspace, monkeypatch):
    """The loss stays finite; the gradient of one sequence breaks on its way back."""
    model, _ = shard.loaded_model(workspace.model, "float32")
    ids = random_ids(SEQUENCES, 12)
    ids[3, 0] = 4

    def broken(module, arguments, output):
        first = ids_seen[-1][:, 0] == 4
        if output.requires_grad:
            output.register_hook(lambda d: torch.where(first[:, None, None], torch.inf, d))

    ids_seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, arguments, keywords: ids_seen.append(keywords["input_ids"]), with_kwargs=True
    )
    model.model.layers[1].mlp.register_forward_hook(broken)
    monkeypatch.setattr(capture, "loaded_model", shard.loaded_model)
    write_table(workspace, ids)
    with pytest.raises(NumericalError, match=r"sequence 3 .*the gradient of model\.layers\.1\.mlp\.(up|gate)_proj"):
        capture.run(workspace, PARAMS)


def test_refuses_a_table_of_another_vocabulary(workspace):
    ids = random_ids(SEQUENCES, 12)
    write_sequences(workspace.table("calibration"), ids.numpy(), [["a"]] * SEQUENCES, VOCABULARY + 1)
    with pytest.raises(InputError, match="vocabulary of 97"):
        capture.run(workspace, PARAMS)


def test_a_flipped_byte_and_a_truncated_shard_are_found(captured, tmp_path):
    out = tmp_path / "capture"
    shutil.copytree(captured.out("capture"), out)
    layer = Statistics(out).layers[0]
    shard = group_file(out / "gradients" / "shard-00001")
    content = shard.read_bytes()
    flipped = content.index(read_array(out / "gradients" / "shard-00001", f"{layer.name}/left").numpy().tobytes())
    shard.unlink()
    shard.write_bytes(content[:flipped] + bytes([content[flipped] ^ 1]) + content[flipped + 1 :])
    with pytest.raises(CorruptArtifact, match="shard-00001"):
        list(Statistics(out).gradient_shards(layer))
    shard.write_bytes(content[:-1])
    with pytest.raises(CorruptArtifact, match="bytes instead of"):
        verify_output(out)
    shard.unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        verify_output(out)


def test_shard_names_are_checked_before_they_become_paths(captured, tmp_path):
    out = tmp_path / "capture"
    shutil.copytree(captured.out("capture"), out)
    facts = out / "capture.json"
    facts.write_text(facts.read_text().replace("shard-00001", "../../etc"))
    reader = Statistics(out)
    with pytest.raises(CorruptArtifact, match="not the name of a shard"):
        list(reader.gradient_shards(reader.layers[0]))


def test_finished_before_it_is_published_again(captured, tmp_path, monkeypatch):
    shutil.copytree(captured.root, tmp_path / "w")
    workspace = Workspace(tmp_path / "w")
    shutil.rmtree(workspace.out("capture"))
    monkeypatch.setattr(capture, "loaded_model", None)
    capture.run(workspace, PARAMS)
    assert_same_bits(workspace, captured)
    assert read_manifest(workspace.out("capture")) == read_manifest(captured.out("capture"))
