"""Groups on shared storage: an S3 server on the loopback interface, faults injected by a proxy before it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from killed import Killed
from object_storage import BUCKET, READ_TIMEOUT, configure
from project import command
from tiny import tiny_workspace

from fisherfold.run import objects, scratch, unit_work
from fisherfold.run.errors import CorruptArtifact, FisherfoldError, StoreError
from fisherfold.run.files import describe_files, read_manifest, verify_output
from fisherfold.run.group_writer import GroupWriter, RowWriter, group_file, write_arrays
from fisherfold.run.object_group import SMALL, ObjectGroup
from fisherfold.run.params import CaptureParams
from fisherfold.run.pointers import StoredObject, pointer_file, read_pointer, write_pointer
from fisherfold.run.store import array_names, gather_groups, offload_group, read_array
from fisherfold.run.workspace import Workspace
from fisherfold.statistics.layer_statistics import Statistics
from fisherfold.statistics.placement import disk_bytes
from flows.storage import check_store, clean_store, unnamed_objects
from stages import capture

LAYERS = [f"layers.{i}.proj" for i in range(12)]
OWN_RETRIES = objects.OPTIONS["s3"]["config_kwargs"]["retries"]
PASSING = ["500", "503", "reset", "stall", "lose answer", "truncate"]


def always(*names: str, of: list[str]) -> list:
    """Faults as parameters: these in every run, the others of their kind with the slow tests."""
    return [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in of if name not in names)]


def arrays(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {f"{name}/left": torch.randn(4, 40, 64, generator=generator) for name in LAYERS}
    draw |= {f"{name}/right": torch.randn(4, 50, 64, generator=generator) for name in LAYERS}
    return draw | {f"{name}/norm": torch.randn(4, generator=generator) for name in LAYERS}


def write_shard(group: Path, values: dict[str, torch.Tensor]) -> None:
    """As capture writes it: whole arrays in the order of their layers, in two parts, then the small ones."""
    large = {name: tensor for name, tensor in values.items() if tensor.ndim > 1}
    with GroupWriter(group) as writer:
        rows = RowWriter(writer, {name: tuple(tensor.shape) for name, tensor in large.items()}, 2)
        for first in (0, 2):
            for name, tensor in large.items():
                rows.append(name, tensor[first : first + 2])
        for name in values:
            if name not in large:
                writer.write(name, values[name])


@pytest.fixture
def shard(storage, tmp_path) -> Path:
    """A shard on shared storage."""
    write_shard(tmp_path / "out" / "shard", arrays())
    offload_group(tmp_path / "out" / "shard")
    storage.requests.clear()
    return tmp_path / "out" / "shard"


def assert_reads(group: Path, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(read_array(group, name), tensor), name


def the_object(group: Path) -> StoredObject:
    (stored,) = read_pointer(pointer_file(group_file(group)))
    return stored


def key_of(stored: StoredObject) -> str:
    return stored.url.removeprefix(f"s3://{BUCKET}/")


def test_every_kind_of_array_reads_alike_and_the_local_file_is_gone(storage, tmp_path):
    values = {
        "scalar": torch.tensor(3.5),
        "none": torch.zeros(0, 4),
        "a/bfloat": torch.randn(9, 4).bfloat16(),
        "a/b/long": torch.arange(2**16),
        "bool": torch.tensor([True, False]),
    }
    write_arrays(tmp_path / "g", values)
    offload_group(tmp_path / "g")
    assert [path.name for path in tmp_path.iterdir()] == ["g.zarr.zip.pointer.json"]
    assert array_names(tmp_path / "g") == sorted(values)
    assert_reads(tmp_path / "g", values)
    assert torch.equal(read_array(tmp_path / "g", "a/bfloat", slice(2, 5)), values["a/bfloat"][2:5])
    with pytest.raises(CorruptArtifact, match="no array 'y'"):
        read_array(tmp_path / "g", "y")


def test_zarr_opens_the_hierarchy(shard):
    group = zarr.open_group(ObjectGroup(pointer_file(group_file(shard))), mode="r")
    assert sorted(group) == ["layers." + name.split(".", 1)[1] for name in sorted(LAYERS)]
    np.testing.assert_array_equal(group[f"{LAYERS[0]}/norm"][...], arrays()[f"{LAYERS[0]}/norm"])


def test_without_the_setting_nothing_moves(tmp_path, monkeypatch):
    monkeypatch.delenv("FISHERFOLD_STORE", raising=False)
    write_arrays(tmp_path / "g", {"x": torch.ones(3)})
    offload_group(tmp_path / "g")
    assert group_file(tmp_path / "g").exists()


def test_a_layer_costs_one_request_a_chunk(storage, shard):
    values = arrays()
    assert all(tensor[:2].nbytes > SMALL for tensor in values.values() if tensor.ndim > 1)
    read_array(shard, f"{LAYERS[0]}/left")
    opened = len(storage.requests)
    assert opened <= 2 + 1 + 2, storage.requests  # size, entries; metadata of all arrays; two chunks
    storage.requests.clear()
    for name in LAYERS[1:]:
        read_array(shard, f"{name}/left")
        read_array(shard, f"{name}/right")
    assert len(storage.requests) == 4 * len(LAYERS[1:])
    storage.requests.clear()
    for name in LAYERS:
        read_array(shard, f"{name}/norm")
    assert len(storage.requests) <= 1


def test_manifest_is_that_of_the_local_file_and_verifying_asks_for_nothing(storage, shard, tmp_path):
    write_shard(tmp_path / "local" / "shard", arrays())
    assert describe_files(shard.parent) == describe_files(tmp_path / "local")
    manifest = json.dumps({"files": describe_files(shard.parent)})
    for folder in (shard.parent, tmp_path / "local"):
        (folder / "manifest.json").write_text(manifest)
    assert verify_output(shard.parent) == verify_output(tmp_path / "local")
    assert storage.requests == []
    write_arrays(tmp_path / "other", {"x": torch.ones(1)})
    offload_group(tmp_path / "other")
    shutil.copy(pointer_file(group_file(tmp_path / "other")), pointer_file(group_file(shard)))
    with pytest.raises(CorruptArtifact, match="is another one by shard"):
        verify_output(shard.parent)
    pointer_file(group_file(shard)).unlink()
    with pytest.raises(CorruptArtifact, match="is missing"):
        verify_output(shard.parent)


def wait_no_longer_than_needed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A server that stalls is left soon; a busy machine is waited for."""
    if fault == "stall":
        configure(monkeypatch, read_timeout=READ_TIMEOUT)


@pytest.mark.parametrize("fault", always("503", "lose answer", of=[name for name in PASSING if name != "truncate"]))
def test_upload_survives_what_passes(storage, tmp_path, fault, monkeypatch):
    wait_no_longer_than_needed(monkeypatch, fault)
    write_shard(tmp_path / "g", arrays())
    storage.break_next("PUT", fault)
    storage.break_next("HEAD", fault)
    offload_group(tmp_path / "g")
    assert not storage.faults["PUT"]
    assert_reads(tmp_path / "g", arrays())


@pytest.mark.parametrize("fault", always("reset", "truncate", "flip", of=[*PASSING, "shorten"]))
def test_reading_survives_what_passes(storage, shard, fault, monkeypatch):
    wait_no_longer_than_needed(monkeypatch, fault)
    storage.break_next("GET", fault)
    assert_reads(shard, arrays())
    assert not storage.faults["GET"]


@pytest.mark.parametrize("fault", always("stall", of=["500", "503", "reset"]))
def test_what_does_not_pass_ends_in_one_error_and_loses_nothing(storage, tmp_path, fault, monkeypatch):
    write_shard(tmp_path / "g", arrays())
    content = group_file(tmp_path / "g").read_bytes()
    storage.always = {"PUT": fault, "GET": fault}
    with monkeypatch.context() as patch:
        wait_no_longer_than_needed(patch, fault)
        patch.setattr(objects, "TRIES", 2)
        with pytest.raises(StoreError, match=r"failed 2 times.*AWS_ENDPOINT_URL and FISHERFOLD_STORE"):
            offload_group(tmp_path / "g")
        assert group_file(tmp_path / "g").read_bytes() == content
        assert not pointer_file(group_file(tmp_path / "g")).exists()
        del storage.always["PUT"]
        patch.setattr(objects, "TRIES", 5)
        offload_group(tmp_path / "g")
        patch.setattr(objects, "TRIES", 2)
        with pytest.raises(StoreError, match=r"failed 2 times"):
            read_array(tmp_path / "g", f"{LAYERS[0]}/left")
    storage.calm()
    assert_reads(tmp_path / "g", arrays())


def test_refused_credentials_are_named_at_once(storage, shard, tmp_path):
    storage.always = {"PUT": "403", "GET": "403", "HEAD": "403"}
    with pytest.raises(StoreError, match=r"was refused.*credentials.*FISHERFOLD_STORE"):
        read_array(shard, f"{LAYERS[0]}/left")
    storage.requests.clear()
    write_shard(tmp_path / "g", arrays())
    with pytest.raises(StoreError, match="was refused"):
        offload_group(tmp_path / "g")
    assert [method for method, _ in storage.requests] == ["PUT"]


@pytest.mark.parametrize(
    "setting, words",
    [
        ("s3://no-such-bucket/x", "Create the bucket, or correct the setting"),
        ("bucket/prefix", "is not a URL such as s3://bucket/prefix"),
        ("s3://name:password@bucket/x", "Credentials do not go there"),
        ("nosuch://bucket/x", "nothing opens nosuch://"),
        ("absent://bucket/x", "needs a package that is not installed"),
    ],
)
def test_wrong_settings_say_what_to_do(storage, tmp_path, monkeypatch, setting, words):
    fsspec.register_implementation("absent", "no_such_module.FileSystem", clobber=True)
    write_arrays(tmp_path / "g", {"x": torch.ones(3)})
    monkeypatch.setenv("FISHERFOLD_STORE", setting)
    with pytest.raises(StoreError, match=words) as caught:
        offload_group(tmp_path / "g")
    assert "FISHERFOLD_STORE" in str(caught.value) and "password" not in str(caught.value)
    assert group_file(tmp_path / "g").exists()


def test_an_endpoint_where_nothing_listens(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    write_arrays(tmp_path / "g", {"x": torch.ones(3)})
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9.*AWS_ENDPOINT_URL"):
        offload_group(tmp_path / "g")


def damage(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :]


@pytest.mark.parametrize("where", always("chunk", "entries", of=["metadata", "truncated", "missing"]))
def test_damaged_objects_are_named_and_written_again(storage, shard, tmp_path, where):
    stored, client = the_object(shard), storage.client()
    key, name = key_of(stored), f"{LAYERS[3]}/left"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    damaged = {
        "chunk": damage(content, content.index(arrays()[name][:2].numpy().tobytes()) + 50),
        "metadata": damage(content, content.index(b'"shape"', content.index(f"{name}/zarr.json".encode()))),
        "entries": damage(content, stored.directory + 1),
        "truncated": content[:-10],
    }
    if where == "missing":
        client.delete_object(Bucket=BUCKET, Key=key)
    else:
        client.put_object(Bucket=BUCKET, Key=key, Body=damaged[where])
    words = {"truncated": "has .* bytes instead of", "missing": "is missing", "entries": "no readable list of entries"}
    with pytest.raises(CorruptArtifact, match=words.get(where, "fails its checksum")) as caught:
        read_array(shard, name)
    assert stored.url in str(caught.value) and "dvc repro --force" in str(caught.value)
    write_shard(tmp_path / "again", arrays())  # what `dvc repro --force` does
    offload_group(tmp_path / "again")
    assert_reads(shard, arrays())


def test_two_writers_of_a_unit_leave_one_whole_object(storage, tmp_path):
    groups = [tmp_path / str(i) / "g" for i in range(2)]
    for group in groups:
        write_shard(group, arrays())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(offload_group, groups))
    assert the_object(groups[0]) == the_object(groups[1])
    assert list(storage.objects()) == [key_of(the_object(groups[0]))]
    assert_reads(groups[0], arrays())


def test_upload_in_parts_appears_whole_or_not_at_all(storage, tmp_path, monkeypatch):
    monkeypatch.setitem(objects.UPLOAD_OPTIONS, "s3", {"chunksize": 5 * 2**20, "max_concurrency": 2})
    monkeypatch.setattr(objects, "TRIES", 1)
    configure(monkeypatch, retries=OWN_RETRIES)
    values = {"x": torch.randn(3 * 2**20)}
    write_arrays(tmp_path / "g", values)
    storage.break_next("PUT", "500")  # one part, tried again alone
    offload_group(tmp_path / "g")
    parts = [path.partition("partNumber=")[2][0] for method, path in storage.requests if "partNumber" in path]
    assert len(parts) == len(set(parts)) + 1 > 3
    assert_reads(tmp_path / "g", values)
    write_arrays(tmp_path / "h", {"x": torch.randn(3 * 2**20)})
    before = storage.objects()
    storage.always["PUT"] = "500"
    with pytest.raises(StoreError):
        offload_group(tmp_path / "h")
    assert storage.objects() == before
    assert "Uploads" not in storage.client().list_multipart_uploads(Bucket=BUCKET)


def test_gathered_parts_become_one_pointer(storage, tmp_path, monkeypatch):
    values = arrays()
    halves = [dict(list(values.items())[::2]), dict(list(values.items())[1::2])]
    for name, half in zip("ab", halves):
        write_shard(tmp_path / name, half)
    offload_group(tmp_path / "a")
    gather_groups(tmp_path / "both", [tmp_path / "a", tmp_path / "none", tmp_path / "b"])  # b was not there yet
    assert array_names(tmp_path / "both") == sorted(values)
    assert_reads(tmp_path / "both", values)
    write_shard(tmp_path / "b", halves[1])
    pointer_file(group_file(tmp_path / "b")).unlink()
    monkeypatch.delenv("FISHERFOLD_STORE")
    with pytest.raises(StoreError, match="Set FISHERFOLD_STORE again"):
        gather_groups(tmp_path / "mixed", [tmp_path / "a", tmp_path / "b"])


@settings(max_examples=30)
@given(
    st.one_of(
        st.binary(), st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps).map(str.encode)
    )
)
def test_no_content_is_taken_for_a_pointer_by_accident(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "x.pointer.json"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"pointer|URL"):
        read_pointer(path)


@pytest.mark.parametrize(
    "field, value", [("url", "/etc/x"), ("bytes", "1"), ("bytes", 5), ("sha256", "ab"), ("directory", -1)]
)
def test_fields_of_a_pointer_are_checked(tmp_path, field, value):
    good = StoredObject("s3://b/x", 10, "0" * 64, 5)
    write_pointer(tmp_path / "x", [good])
    assert read_pointer(pointer_file(tmp_path / "x")) == [good]
    write_pointer(tmp_path / "x", [StoredObject(**{**vars(good), field: value})])
    with pytest.raises(CorruptArtifact, match="does not name objects"):
        read_pointer(pointer_file(tmp_path / "x"))


PARAMS = CaptureParams(batch_size=2, sequences_per_shard=2, leaves=3, gradients="sketch", sketch_rank=4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Workspace:
    return tiny_workspace(tmp_path_factory.mktemp("prepared"), "llama", 6)


@pytest.fixture(scope="module")
def local(prepared, tmp_path_factory) -> Workspace:
    """The output of `capture` on the file system."""
    return captured(prepared, tmp_path_factory.mktemp("local"))


def captured(prepared: Workspace, folder: Path, params: CaptureParams = PARAMS) -> Workspace:
    shutil.copytree(prepared.root, folder / "w", dirs_exist_ok=True)
    capture.run(Workspace(folder / "w"), params)
    return Workspace(folder / "w")


def test_capture_is_the_same_and_keeps_no_gradient_here(storage, prepared, local, tmp_path):
    remote = captured(prepared, tmp_path)
    assert read_manifest(remote.out("capture")) == read_manifest(local.out("capture"))
    assert len(storage.objects()) == 3
    assert not list(remote.artifacts.rglob("shard*.zarr.zip")) and not list(
        remote.artifacts.rglob("gradients.zarr.zip")
    )
    readers = Statistics(remote.out("capture")), Statistics(local.out("capture"))
    for layer in readers[0].layers:
        assert torch.equal(*(reader.gradient_norms(layer) for reader in readers))
        for ours, theirs in zip(*(reader.gradient_shards(layer) for reader in readers), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_capture_by_slices_of_layers_gathers_pointers(storage, prepared, local, tmp_path):
    params = PARAMS.model_copy(update={"layers_per_pass": 8})
    remote = captured(prepared, tmp_path, params)
    readers = Statistics(remote.out("capture")), Statistics(local.out("capture"))
    for layer in readers[0].layers:
        for ours, theirs in zip(*(reader.gradient_shards(layer) for reader in readers), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert disk_bytes(readers[0].layers, params, 6) < disk_bytes(readers[0].layers, PARAMS, 6)


@pytest.mark.parametrize(("module", "step"), [(scratch, "append_line"), (unit_work, "sync_tree")])
def test_killed_between_upload_and_manifest_it_goes_on(storage, prepared, local, tmp_path, monkeypatch, module, step):
    with monkeypatch.context() as patch:
        patch.setattr(module, step, lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            captured(prepared, tmp_path)
    assert len(storage.objects()) == 1
    remote = captured(prepared, tmp_path)
    assert len(storage.objects()) == 3
    assert read_manifest(remote.out("capture")) == read_manifest(local.out("capture"))


def test_storage_that_goes_away_in_mid_capture_costs_one_unit(storage, prepared, local, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "TRIES", 1)
    storage.break_next("PUT", *[None] * 2, *["503"] * 8)
    with pytest.raises(FisherfoldError, match="Finished units are kept"):
        captured(prepared, tmp_path)
    storage.calm()
    remote = captured(prepared, tmp_path)
    assert sum(method == "PUT" for method, _ in storage.requests) == 1
    assert read_manifest(remote.out("capture")) == read_manifest(local.out("capture"))


def test_a_run_goes_on_with_the_setting_changed(storage, prepared, local, tmp_path, monkeypatch):
    storage.always["PUT"] = "403"
    storage.break_next("PUT", None)
    with pytest.raises(StoreError):
        captured(prepared, tmp_path)
    monkeypatch.delenv("FISHERFOLD_STORE")
    mixed = captured(prepared, tmp_path)
    names = sorted(path.name for path in (mixed.out("capture") / "gradients").iterdir())
    assert [name.removeprefix("shard-0000") for name in names] == [
        "0.zarr.zip.pointer.json",
        "1.zarr.zip",
        "2.zarr.zip",
    ]
    assert read_manifest(mixed.out("capture")) == read_manifest(local.out("capture"))


@pytest.fixture
def project(storage, tmp_path) -> Workspace:
    """A project with one shard on shared storage, and one object there that nothing names."""
    workspace = Workspace(tmp_path / "project")
    workspace.root.mkdir()
    command(workspace.root, "dvc", "init", "--no-scm", "--quiet", check=True)
    for name, seed in (("artifacts/capture/gradients/shard", 0), ("forgotten", 1)):
        write_shard(workspace.root / name, arrays(seed))
        offload_group(workspace.root / name)
    return workspace


def test_garbage_is_what_neither_artifacts_nor_the_cache_names(storage, project, capsys):
    shard, forgotten = (project.root / name for name in ("artifacts/capture/gradients/shard", "forgotten"))
    assert clean_store([project], days=1, delete=True) == 0  # too young
    assert len(storage.objects()) == 2
    listed = [the_object(forgotten).url]
    assert list(unnamed_objects([project], timedelta(0))) == listed
    cache = project.root / ".dvc" / "cache" / "files" / "md5"
    pointer = cache / "ab" / "cdef"
    pointer.parent.mkdir(parents=True)
    shutil.copy(pointer_file(group_file(forgotten)), pointer)
    (cache / "ab" / "0.dir").write_text(json.dumps([{"md5": "abcdef", "relpath": "gradients/x.zarr.zip.pointer.json"}]))
    assert list(unnamed_objects([project], timedelta(0))) == []
    pointer.unlink()
    with pytest.raises(StoreError, match="dvc fetch"):
        unnamed_objects([project], timedelta(0))
    shutil.rmtree(cache)
    assert clean_store([project], days=0, delete=True) == 0
    assert list(storage.objects()) == [key_of(the_object(shard))]
    assert "1 objects" in capsys.readouterr().out


def test_check_probes_and_names_what_is_gone(storage, project, capsys, monkeypatch):
    before = storage.objects()
    assert check_store(project) == 0
    assert storage.objects() == before
    storage.always["PUT"] = "403"
    with pytest.raises(StoreError, match="was refused"):
        check_store(project)
    storage.calm()
    monkeypatch.setenv("FISHERFOLD_STORE", "s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="Create the bucket"):
        check_store(project)
    monkeypatch.delenv("FISHERFOLD_STORE")  # pointers are read without it
    stored = the_object(project.root / "artifacts/capture/gradients/shard")
    storage.client().delete_object(Bucket=BUCKET, Key=key_of(stored))
    assert check_store(project) == 1
    assert f"{stored.url} is missing" in capsys.readouterr().out
