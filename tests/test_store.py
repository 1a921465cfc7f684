import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stages import store
from stages.errors import CorruptArtifact
from stages.store import RowWriter, array_names, gather_groups, read_array, write_arrays

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_]


@given(
    hnp.arrays(st.sampled_from(DTYPES), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)),
    st.sampled_from([1, 16, 100, 10**6]),
)
@settings(max_examples=60, deadline=None)
def test_zarr_reads_what_is_written(tmp_path_factory, values, chunk_bytes):
    folder = tmp_path_factory.mktemp("group")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", chunk_bytes)
        write_arrays(folder, {"a/b": torch.from_numpy(values)})
    array = zarr.open_group(store=str(folder), mode="r")["a/b"]
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
    writer = RowWriter(tmp_path, {name: tuple(array.shape) for name, array in values.items()}, rows)
    for name, array in values.items():
        for part in array.split(rows):
            writer.append(name, part)
    assert array_names(tmp_path) == ["a/x", "a/y"]
    for name, array in values.items():
        assert torch.equal(read_array(tmp_path, name), array)


def test_groups_gathered_by_links_hold_all_arrays(tmp_path):
    for name in ("one", "two"):
        write_arrays(tmp_path / name, {f"{name}/x": torch.ones(3)})
    gather_groups(tmp_path / "both", [tmp_path / "one", tmp_path / "two"])
    assert array_names(tmp_path / "both") == ["one/x", "two/x"]
    assert (tmp_path / "both" / "one" / "x" / "c.0").stat().st_nlink == 2


def test_an_array_is_never_overwritten(tmp_path):
    write_arrays(tmp_path, {"x": torch.ones(3)})
    with pytest.raises(FileExistsError):
        write_arrays(tmp_path, {"x": torch.ones(3)})


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", "", ".x"])
def test_names_that_are_no_paths_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not an array name"):
        write_arrays(tmp_path, {name: torch.ones(3)})
    with pytest.raises(ValueError, match="not an array name"):
        read_array(tmp_path, name)


def test_a_changed_bit_a_short_chunk_and_a_missing_array_are_found(tmp_path):
    write_arrays(tmp_path, {"x": torch.randn(100)})
    chunk = tmp_path / "x" / "c.0"
    content = chunk.read_bytes()
    for damaged in (content[:50] + bytes([content[50] ^ 16]) + content[51:], content[:-1], content[:-8]):
        chunk.write_bytes(damaged)
        with pytest.raises(CorruptArtifact, match="array 'x'"):
            read_array(tmp_path, "x")
    with pytest.raises(CorruptArtifact, match="no array 'y'"):
        read_array(tmp_path, "y")
