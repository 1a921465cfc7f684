"""Reading gradient shards from shared storage against reading them from local files: MB/s, and requests a layer.

    python benchmarks/store.py            # four shards of 26 MB, medians of 5
    python benchmarks/store.py --quick    # one shard, medians of 3

The storage is moto's S3 server on the loopback interface, in a process of its own. It is no measure of a real one: for each
range request it copies the whole object and opens a connection. The same ranges are therefore fetched by s3fs alone as well, with nothing checked; the
figure is the share of that speed that reading through a pointer reaches. Requests do not depend on the server;
what they cost at a distance is shown with LATENCY added to each, as the next stage reads: a layer of one shard after another, the
next one fetched ahead.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import torch
from figures import at_least

from fisherfold.run import object_group, store
from fisherfold.run.group_writer import GroupWriter, RowWriter, group_file
from fisherfold.run.objects import file_system
from fisherfold.run.store import offload_group, read_array

TARGET = 0.5
LATENCY = 0.03  # seconds
LAYERS, SEQUENCES, OUTPUTS, INPUTS, RANK = 24, 8, 576, 1536, 16
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def write_shard(group: Path, seed: int) -> list[str]:
    """A shard as stage `capture` writes it; the names of its arrays, in the order in which the next stage reads them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {}
    for layer in range(LAYERS):
        shapes[f"layers.{layer}/left"] = (SEQUENCES, OUTPUTS, RANK)
        shapes[f"layers.{layer}/right"] = (SEQUENCES, INPUTS, RANK)
    with GroupWriter(group) as writer:
        rows = RowWriter(writer, shapes, SEQUENCES)
        for name, shape in shapes.items():
            rows.append(name, torch.randn(shape, generator=generator))
        for layer in range(LAYERS):
            writer.write(f"layers.{layer}/norm", torch.randn(SEQUENCES, generator=generator))
    return list(shapes)


def watched(read: Callable, ranges: list, latency: float = 0.0) -> Callable:
    """`read_range`, noting what it is asked for, after a delay."""

    def note(url: str, start: int, stop: int) -> bytes:
        ranges.append((url, start, stop))
        time.sleep(latency)
        return read(url, start, stop)

    return note


def read_all(groups: list[Path], names: list[str], ahead: bool = False) -> float:
    """Seconds to read every array of every shard, layer by layer."""
    store.close_groups()
    start = time.perf_counter()
    for left, right in zip(names[::2], names[1::2]):
        if ahead:
            for _ in store.read_in_turn(groups, [left, right]):
                pass
        else:
            for group in groups:
                read_array(group, left), read_array(group, right)
    return time.perf_counter() - start


def fetch_bare(ranges: list[tuple[str, int, int]]) -> float:
    """Seconds to fetch the same ranges by fsspec alone, with nothing checked."""
    start = time.perf_counter()
    for url, first, stop in ranges:
        system, path = file_system(url)
        system.cat_file(path, start=first, end=stop)
    return time.perf_counter() - start


def serve() -> tuple[subprocess.Popen, str]:
    """moto's server in a process of its own, and its address."""
    code = (
        "import sys, time; from moto.server import ThreadedMotoServer; s = ThreadedMotoServer('127.0.0.1', 0, verbose=False);"
        "s.start(); print(s.get_host_and_port()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    with urlopen(f"{endpoint}/moto-api/"):
        return process, endpoint


def measure(folder: Path, shards: int, repeats: int) -> dict[str, float]:
    """Medians in seconds, and the requests of a layer."""
    import boto3

    boto3.client("s3").create_bucket(Bucket="bench")
    local = [folder / "local" / f"shard-{shard:05d}" for shard in range(shards)]
    remote = [folder / "remote" / f"shard-{shard:05d}" for shard in range(shards)]
    for shard in range(shards):
        for group in (local[shard], remote[shard]):
            names = write_shard(group, shard)
    size = sum(group_file(group).stat().st_size for group in local)
    start = time.perf_counter()
    for group in remote:
        offload_group(group)
    upload = time.perf_counter() - start
    ranges: list[tuple[str, int, int]] = []
    read = object_group.read_range
    object_group.read_range = watched(read, ranges)
    read_all(remote, names[:2])
    opening = len(ranges) - 2 * shards
    read_all(remote, names[2:])
    object_group.read_range = read
    times: dict[str, list[float]] = {"local": [], "remote": [], "bare": []}
    for _ in range(repeats):
        times["local"].append(read_all(local, names))
        times["bare"].append(fetch_bare(ranges))
        times["remote"].append(read_all(remote, names))
    object_group.read_range = watched(read, [], LATENCY)
    times |= {"far": [read_all(remote, names)], "far, ahead": [read_all(remote, names, ahead=True)]}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        **medians,
        "upload": upload,
        "MB": size / 1e6,
        "per layer": (len(ranges) - opening - 2 * shards) / ((LAYERS - 1) * shards),
        "to open": opening / shards + 1,  # and its size
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shards, under a minute")
    options = parser.parse_args()
    process, endpoint = serve()
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=endpoint, FISHERFOLD_STORE="s3://bench/shards")
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), 1 if options.quick else 4, 3 if options.quick else 5)
    finally:
        process.communicate("")
    print(f"{'':34} seconds     MB/s")
    for name, text in (
        ("local", "local files"),
        ("bare", "same ranges by s3fs alone"),
        ("remote", "through pointers"),
        ("far", f"the same, {1000 * LATENCY:.0f} ms more a request"),
        ("far, ahead", "the same, next shard ahead"),
        ("upload", "upload (hashed, size compared)"),
    ):
        print(f"{text:34} {found[name]:7.3f}  {found['MB'] / found[name]:7.0f}")
    print(
        f"requests: {found['per layer']:.1f} a layer and shard (left and right), {found['to open']:.1f} to open a shard"
    )
    share = found["bare"] / found["remote"]
    print(f"local files are {found['remote'] / found['local']:.1f} times as fast as this server")
    print(at_least("reading a shard from S3: share of the speed of s3fs alone", share, "ratio", TARGET))


if __name__ == "__main__":
    main()
