"""Files from packages: joined, checked, cached, never half there."""

import hashlib
import io
import tarfile
import threading

import pytest
from wheels import make_wheel

from fisherfold.inputs import packages
from fisherfold.inputs.packages import cache_folder, fetch_file
from fisherfold.inputs.recipes import PackagedFile, PackagedMember
from fisherfold.run.errors import InputError, NotEnoughDisk

PARTS = {"demo-part1": b"first half, ", "demo-part2": b"second half"}
WHOLE = b"".join(PARTS.values())
DIGEST = hashlib.sha256(WHOLE).hexdigest()


def packaged(sha256=DIGEST, member="data.bin"):
    parts = [PackagedMember(name=name, version="1.0", member=f"{name.replace('-', '_')}/{member}") for name in PARTS]
    return PackagedFile(name="demo.bin", bytes=len(WHOLE), sha256=sha256, packages=parts)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with the wheels, and a download that counts."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, data in PARTS.items():
        make_wheel(folder, name, {"data.bin": data})
    monkeypatch.setenv("FISHERFOLD_CACHE", str(tmp_path / "cache"))
    calls = []

    def download(member, target):
        calls.append(member.requirement)
        name = f"{member.requirement.replace('==', '-').replace('-part', '_part')}-py3-none-any.whl"
        (target / name).write_bytes((folder / name).read_bytes())

    monkeypatch.setattr(packages, "download", download)
    return calls


def test_parts_are_joined_and_cached(index):
    path = fetch_file(packaged())
    assert path.read_bytes() == WHOLE and path.name == "demo.bin"
    assert fetch_file(packaged()) == path
    assert index == ["demo-part1==1.0", "demo-part2==1.0"]
    assert [entry.name for entry in path.parent.iterdir()] == ["demo.bin"]


def test_damaged_cache_is_fetched_again(index):
    path = fetch_file(packaged())
    path.write_bytes(WHOLE[:-1] + b"!")
    assert fetch_file(packaged()).read_bytes() == WHOLE


def test_wrong_digest_keeps_nothing(index):
    with pytest.raises(InputError, match="SHA-256"):
        fetch_file(packaged(sha256="0" * 64))
    assert list((cache_folder() / "files" / ("0" * 64)).iterdir()) == []


def test_missing_member(index):
    with pytest.raises(InputError, match="holds no readable"):
        fetch_file(packaged(member="other.bin"))


def test_interrupted_fetch_leaves_nothing_that_counts(index, monkeypatch):
    monkeypatch.setattr(packages, "digest_file", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch_file(packaged())
    monkeypatch.undo()
    assert not (cache_folder() / "files" / packaged().sha256 / "demo.bin").exists()


def test_concurrent_fetches_download_once(index):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch_file(packaged()).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [WHOLE] * 4 and len(index) == 2


def test_disk_is_checked_first(index):
    with pytest.raises(NotEnoughDisk):
        fetch_file(packaged().model_copy(update={"bytes": 10**16}))
    assert index == []


def test_pip_downloads_the_wheel_alone(tmp_path, monkeypatch):
    """The real pip, on a folder of wheels; then with nothing to find."""
    make_wheel(tmp_path, "demo-part1", {"data.bin": b"x"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    target = tmp_path / "target"
    packages.download(packaged().packages[0], target)
    assert [path.name for path in target.iterdir()] == ["demo_part1-1.0-py3-none-any.whl"]
    absent = PackagedMember(name="demo-absent", version="2.0", member="data.bin")
    with pytest.raises(InputError, match=r"Package demo-absent==2.0 could not be downloaded .*PIP_FIND_LINKS"):
        packages.download(absent, target)


def test_a_member_of_a_source_archive(tmp_path, monkeypatch):
    def download(member, target):
        with tarfile.open(target / "demo-1.0.tar.gz", "w:gz") as archive:
            entry = tarfile.TarInfo("demo-1.0/text.txt")
            entry.size = len(WHOLE)
            archive.addfile(entry, io.BytesIO(WHOLE))

    monkeypatch.setenv("FISHERFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packages, "download", download)
    part = PackagedMember(name="demo", version="1.0", member="demo-1.0/text.txt", form="sdist")
    file = PackagedFile(name="text.txt", bytes=len(WHOLE), sha256=DIGEST, packages=[part])
    assert fetch_file(file).read_bytes() == WHOLE
    missing = part.model_copy(update={"member": "demo-1.0/other.txt"})
    with pytest.raises(InputError, match=r"The sdist of demo==1\.0 holds no readable"):
        fetch_file(file.model_copy(update={"sha256": "0" * 64, "packages": (missing,)}))


def test_cache_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERFOLD_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("FISHERFOLD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fisherfold"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder().is_absolute()
    monkeypatch.setenv("FISHERFOLD_CACHE", "~nobody-of-this-name/cache")
    with pytest.raises(InputError, match="FISHERFOLD_CACHE='~nobody"):
        cache_folder()
