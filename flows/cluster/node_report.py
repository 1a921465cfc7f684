"""What one node of a cluster says of itself. Standard library alone (so flock by itself, not filelock): it is sent to nodes that may
lack everything else."""

import fcntl
import hashlib
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("ray", "torch", "transformers", "numpy", "zarr", "safetensors")
"""Packages whose version can change a bit of a result, or the protocol between nodes."""


@dataclass(frozen=True)
class NodeReport:
    """Attributes:
    node: its address.
    python: version of the interpreter.
    packages: version of each of PACKAGES and of fisherfold; empty text for one that is not installed.
    code: digest of fisherfold's own source text.
    time: seconds since the epoch, when the report was made.
    gpus: that the cluster counts on this node.
    cuda: whether torch reaches a GPU; None if nothing asked for one.
    probe: text of the file that the head wrote; None if it cannot be read here.
    writes: whether the node can write beside it.
    excluded: whether the lock that the head holds on it is seen here; None if locks do not work here.
    free: bytes free there.
    store: what keeps the node from the object storage; empty text if nothing does, or none is set.
    """

    node: str
    python: str
    packages: dict[str, str]
    code: str
    time: float
    gpus: float = 0.0
    cuda: bool | None = None
    probe: str | None = None
    writes: bool = False
    excluded: bool | None = None
    free: int = 0
    store: str = ""


def report_node(node: str, probe: str, gpus: float, ask_cuda: bool) -> NodeReport:
    """Look around on this node; `probe` is a file that the head wrote and holds a lock on."""
    path = Path(probe)
    text = _read(path)
    return NodeReport(
        node=node,
        python=platform.python_version(),
        packages={name: _version(name) for name in (*PACKAGES, "fisherfold")},
        code=code_digest(),
        time=time.time(),
        gpus=gpus,
        cuda=_reaches_gpu() if ask_cuda else None,
        probe=text,
        writes=text is not None and _writes(path.with_name(f"{path.name}.{node}.{os.getpid()}.partial")),
        excluded=None if text is None else is_excluded(path),
        free=0 if text is None else shutil.disk_usage(path.parent).free,
        store=_store_fault(),
    )


def code_digest() -> str:
    """Digest of the source text of the packages `fisherfold`, `stages` and `flows` as this process would import them; empty without them."""
    digest = hashlib.sha256()
    for package in ("fisherfold", "stages", "flows"):
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return ""
        for path in sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def locked_probe(folder: Path) -> Iterator[Path | None]:
    """A file in `folder` with a text of its own, locked while the block runs; None if it cannot be locked."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"doctor-{secrets.token_hex(8)}.partial"
    path.write_text(path.stem, encoding="utf-8")
    try:
        with path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
            else:
                yield path
    finally:
        path.unlink(missing_ok=True)


def is_excluded(path: Path) -> bool | None:
    """Whether a lock that another holds on `path` keeps this process out; None if the file system has no such locks."""
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _writes(path: Path) -> bool:
    try:
        path.write_text("", encoding="utf-8")
        path.unlink()
    except OSError:
        return False
    return True


def _store_fault() -> str:
    try:
        from flows.storage import probe_store
    except ImportError:
        return ""  # the versions tell
    try:
        probe_store()
    except Exception as error:  # whatever it is, the report goes back
        return f"{type(error).__name__}: {error}"
    return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _reaches_gpu() -> bool:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that asks for none
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
