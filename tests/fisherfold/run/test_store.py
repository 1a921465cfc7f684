import errno

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.storage import ZipStore

from fisherfold.run import files, group_writer, store
from fisherfold.run.errors import CorruptArtifact
from fisherfold.run.files import describe_files, digest_file
from fisherfold.run.group_writer import (
    CHUNK_BYTES,
    GroupSize,
    GroupWriter,
    RowWriter,
    chunk_shape,
    group_file,
    write_arrays,
)
from fisherfold.run.store import array_names, gather_groups, parts_folder, read_array

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]


@given(
    hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)),
    st.sampled_from([1, 16, 100, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_zarr_reads_what_is_written(tmp_path_factory, values, chunk_bytes):
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_writer, "CHUNK_BYTES", chunk_bytes)
        write_arrays(folder, {"a/b": torch.from_numpy(values)})
    array = zarr.open_group(store=ZipStore(group_file(folder), mode="r"), mode="r")["a/b"]
    np.testing.assert_array_equal(array[...], values)
    assert array.dtype == values.dtype
    assert torch.equal(torch.isfinite(read_array(folder, "a/b")), torch.isfinite(torch.from_numpy(values)))


def test_bfloat16_and_parts_of_arrays(tmp_path):
    values = torch.randn(9, 4).bfloat16()
    write_arrays(tmp_path, {"x": values})
    assert torch.equal(read_array(tmp_path, "x"), values)
    assert torch.equal(read_array(tmp_path, "x", slice(2, 5)), values[2:5])


@pytest.mark.parametrize("rows", [1, 2, 6, 7])
def test_rows_appended_make_the_whole(tmp_path, rows):
    values = {"a/x": torch.randn(7, 3, 2), "a/y": torch.randn(7, 5)}
    with GroupWriter(tmp_path) as group:
        writer = RowWriter(group, {name: tuple(array.shape) for name, array in values.items()}, rows)
        for name, array in values.items():
            for part in array.split(rows):
                writer.append(name, part)
    assert array_names(tmp_path) == ["a/x", "a/y"]
    for name, array in values.items():
        assert torch.equal(read_array(tmp_path, name), array)


def test_gathered_groups_hold_all_arrays_and_one_alone_is_linked(tmp_path):
    for name in ("one", "two"):
        write_arrays(tmp_path / name, {f"{name}/x": torch.ones(3), f"shared/{name}": torch.zeros(2)})
    gather_groups(tmp_path / "both", [tmp_path / "one", tmp_path / "none", tmp_path / "two"])
    assert array_names(tmp_path / "both") == ["one/x", "shared/one", "shared/two", "two/x"]
    assert torch.equal(read_array(tmp_path / "both", "two/x"), torch.ones(3))
    gather_groups(tmp_path / "alone", [tmp_path / "one"])
    assert group_file(tmp_path / "alone").stat().st_nlink == 2


def test_large_groups_are_gathered_by_links_and_small_ones_share_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LINKED_BYTES", 2000)
    values = {f"layer.{i}/x": torch.randn(600 if i % 2 else 6) for i in range(5)}
    for name, tensor in values.items():
        write_arrays(tmp_path / name.replace("/", "-"), {name: tensor})
    gather_groups(tmp_path / "all", [tmp_path / name.replace("/", "-") for name in values])
    parts = sorted(parts_folder(tmp_path / "all").iterdir())
    assert [path.name for path in parts] == [f"{i:05d}.zarr.zip" for i in range(3)]
    assert [path.stat().st_nlink for path in parts] == [2, 2, 1]
    assert array_names(tmp_path / "all") == sorted(values)
    for name, tensor in values.items():
        assert torch.equal(read_array(tmp_path / "all", name), tensor)
        assert torch.equal(read_array(tmp_path / "all", name, slice(2, 4)), tensor[2:4])
    with pytest.raises(CorruptArtifact, match="no array"):
        read_array(tmp_path / "all", "layer.9/x")


def test_a_written_group_is_not_read_again_to_be_described(tmp_path, monkeypatch):
    write_arrays(tmp_path / "a" / "x", {"y": torch.randn(100)})
    expected = digest_file(group_file(tmp_path / "a" / "x"))
    gather_groups(tmp_path / "b" / "x", [tmp_path / "a" / "x"])
    monkeypatch.setattr(files, "digest_file", None)
    assert [describe_files(tmp_path / side)["x.zarr.zip"]["sha256"] for side in "ab"] == [expected] * 2


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9)),
    st.sampled_from([1, 40, 10**6]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_a_part_of_an_array_is_numpy_s(tmp_path_factory, values, chunk_bytes, data):
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_writer, "CHUNK_BYTES", chunk_bytes)
        write_arrays(folder, {"x": torch.from_numpy(values)})
    slices = st.slices(len(values)).filter(lambda where: (where.step or 1) > 0)
    where = data.draw(st.one_of(slices, st.integers(0, len(values) - 1)))
    np.testing.assert_array_equal(read_array(folder, "x", where).numpy(), values[where])


def test_same_arrays_are_the_same_bytes_and_a_rewritten_group_is_a_new_file(tmp_path):
    write_arrays(tmp_path / "x", {"a": torch.ones(3)})
    first = group_file(tmp_path / "x").read_bytes()
    gather_groups(tmp_path / "linked", [tmp_path / "x"])
    assert torch.equal(read_array(tmp_path / "x", "a"), torch.ones(3))
    write_arrays(tmp_path / "x", {"a": torch.zeros(3)})
    assert torch.equal(read_array(tmp_path / "x", "a"), torch.zeros(3))
    assert torch.equal(read_array(tmp_path / "linked", "a"), torch.ones(3))
    write_arrays(tmp_path / "x", {"a": torch.ones(3)})
    assert group_file(tmp_path / "x").read_bytes() == first


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", "", ".x"])
def test_names_that_are_no_paths_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not an array name"):
        write_arrays(tmp_path, {name: torch.ones(3)})
    with pytest.raises(ValueError, match="not an array name"):
        read_array(tmp_path, name)


def test_a_changed_bit_a_short_file_and_a_missing_array_are_found(tmp_path):
    values = torch.randn(100)
    write_arrays(tmp_path / "group", {"x": values})
    path = group_file(tmp_path / "group")
    content = path.read_bytes()
    inside = content.index(values.numpy().tobytes()) + 50
    for damaged in (
        content[:inside] + bytes([content[inside] ^ 16]) + content[inside + 1 :],
        content[: len(content) // 2],
    ):
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="array 'x' fails its checksum"):
            read_array(tmp_path / "group", "x")
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match="no array 'y'"):
        read_array(tmp_path / "group", "y")
    path.unlink()
    with pytest.raises(CorruptArtifact, match="no array 'x'"):
        read_array(tmp_path / "group", "x")


def test_zarr_s_own_checksum_is_there_too(tmp_path):
    write_arrays(tmp_path, {"x": torch.ones(3)})
    metadata = zarr.open_array(store=ZipStore(group_file(tmp_path), mode="r"), path="x", mode="r").metadata
    assert [type(codec).__name__ for codec in metadata.codecs] == ["BytesCodec", "Crc32cCodec"]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    st.sampled_from([1, 16, 100, 10**6]),
)
@settings(max_examples=60)
def test_the_size_of_a_group_is_known_before_it_is_written(tmp_path_factory, shapes, chunk_bytes):
    folder = tmp_path_factory.mktemp("group")
    size = GroupSize()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_writer, "CHUNK_BYTES", chunk_bytes)
        write_arrays(folder, {f"layer.{i}/x": torch.zeros(shape) for i, shape in enumerate(shapes)})
        for i, shape in enumerate(shapes):
            size.array(f"layer.{i}/x", shape)
    assert group_file(folder).stat().st_size == size.total


def test_the_size_of_a_large_group_counts_its_wide_offsets(tmp_path, monkeypatch):
    monkeypatch.setattr(group_writer.zipfile, "ZIP64_LIMIT", 4000)
    size = GroupSize()
    write_arrays(tmp_path, {f"layer.{i}/x": torch.zeros(100) for i in range(20)})
    for i in range(20):
        size.array(f"layer.{i}/x", (100,))
    assert group_file(tmp_path).stat().st_size == size.total > 8000


def test_the_size_of_rows_appended_is_known_too(tmp_path):
    size = GroupSize()
    size.array("a/x", (7, 3, 2), rows_per_chunk=3)
    size.array("a/y", (7, 5), torch.bfloat16, 3)
    with GroupWriter(tmp_path) as group:
        writer = RowWriter(group, {"a/x": (7, 3, 2), "a/y": (7, 5)}, 3, {"a/y": torch.bfloat16})
        for part in torch.zeros(7, 3, 2).split(3):
            writer.append("a/x", part)
            writer.append("a/y", part.new_zeros(len(part), 5, dtype=torch.bfloat16))
    assert group_file(tmp_path).stat().st_size == size.total


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_chunks_waste_less_than_a_row_each_and_stay_small(rows, columns):
    height, width = chunk_shape((rows, columns), 4)
    parts = -(-rows // height)
    assert width == columns and parts * height - rows < max(parts, 2)
    assert 4 * height * width <= CHUNK_BYTES + 4 * columns


@pytest.mark.parametrize("room", [0, 300, 2000])
def test_a_disk_that_fills_up_is_what_is_told(tmp_path, monkeypatch, room):
    """At whatever write, also where nobody closes the group; what is left looks like no whole group."""
    write = group_writer.DigestedFile.write

    def full(self, content):
        if not self._abandoned and self.tell() + len(content) > room:
            self._length += len(content)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    monkeypatch.setattr(group_writer.DigestedFile, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write_arrays(tmp_path / "group", {f"a{i}": torch.ones(8, 8) for i in range(9)})
    with pytest.raises(OSError, match="No space left"):
        writer = GroupWriter(tmp_path / "other")
        for i in range(9):
            writer.write(f"a{i}", torch.ones(8, 8))
    with pytest.raises(CorruptArtifact):
        read_array(tmp_path / "group", "a0")
