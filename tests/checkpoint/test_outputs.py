"""Where outputs go: what is replaced, what is left behind, and which of them an error names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
import torch
from checkpoints import shards, vit
from dimap.stream import prune_checkpoint
from safetensors.torch import save_file


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(vit(), "in.safetensors")
    return "in.safetensors"


def special(kind):
    if kind == "a pipe":
        os.mkfifo("special")
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind("special")
    elif os.geteuid() != 0:
        pytest.skip("only root makes devices")
    else:
        os.mknod("special", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device"])
@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_only_files_are_replaced(source, kind, link, force):
    special(kind)
    if link:
        os.symlink("special", "link.safetensors")
    else:
        os.rename("special", "link.safetensors")
    before = os.lstat("link.safetensors")
    for options in (
        {"target": "link.safetensors"},
        {"target": "o.safetensors", "masks": "link.safetensors"},
        {"target": "o.safetensors", "report": "link.safetensors"},
    ):
        with pytest.raises(FileExistsError, match=f"must be a f.*, got {kind}"):
            prune_checkpoint(source, sparsity=0.5, force=force, **options)
    assert os.lstat("link.safetensors") == before
    assert not os.path.exists("o.safetensors")


@pytest.mark.parametrize("length", [230, 236, 255])
@pytest.mark.parametrize("folder", [False, True])
def test_names_as_long_as_they_may_be(source, length, folder):
    name = "x" * (length - 12) + ".safetensors"
    if folder:
        shards(Path("in"), vit())
        source, name = "in", "x" * length
    prune_checkpoint(source, name, 0.5, masks="m" * length)
    Path(f"{'m' * length}").unlink()
    left = [p for p in os.listdir() if p.endswith("dimap-tmp")]
    assert (os.path.exists(name), left) == (True, [])
    with pytest.raises(ZeroDivisionError):
        prune_checkpoint(source, name, 0.5, force=True, progress=Fails())
    assert os.path.exists(name)
    assert not [p for p in os.listdir() if p.endswith("dimap-tmp")]


@pytest.mark.parametrize("what", ["target", "masks", "report"])
def test_a_name_too_long_is_told_before_any_work(source, what):
    long = "y" * 252 + ".json"
    options = {"target": "o.safetensors"} | {what: long}
    if what == "target":
        options = {"target": "y" * 250 + ".safetensors"}
    with pytest.raises(OSError, match="File name too long") as error:
        prune_checkpoint(source, sparsity=0.5, **options)
    assert error.value.filename == options[what]
    assert os.listdir() == [source]


def test_read_only_leftovers_and_outputs_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shards(Path("in"), vit())
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "sub" / "deep" / "vocab.txt").write_text("words")
    (folder / "config.json").chmod(0o444)
    for path in (folder / "sub" / "deep", folder / "sub"):
        path.chmod(0o555)
    left = Path(".out.01234567.dimap-tmp")
    shutil.copytree(folder, left)
    left.chmod(0o300)  # as of another umask

    def work():
        prune_checkpoint("in", "out", 0.5, format="bitmask")
        prune_checkpoint("in", "out", 0.5, force=True)
        with pytest.raises(ZeroDivisionError):
            prune_checkpoint("in", "again", 0.5, progress=Fails())

    as_nobody(tmp_path, work)
    assert sorted(os.listdir()) == ["in", "out"]
    assert stat.S_IMODE(os.stat("out/sub/deep").st_mode) == 0o555
    for path in Path().rglob("*"):
        if path.is_dir():
            path.chmod(0o755)


class Fails:
    def step(self, description, total=None):
        if description == "writing":
            raise ZeroDivisionError

    def advance(self, amount):
        pass


def as_nobody(folder, work):
    """Root can write everywhere."""
    if os.geteuid() != 0:
        work()
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534)
    parents = {p: p.stat().st_mode for p in folder.parents if p.stat().st_mode & 0o11 != 0o11}
    for path, mode in parents.items():
        path.chmod(mode | 0o11)
    os.seteuid(65534)
    try:
        work()
    finally:
        os.seteuid(0)
        for path, mode in parents.items():
            path.chmod(mode)


@pytest.mark.parametrize("full", ["out", "masks", "side", "report"])
def test_an_error_of_a_full_disk_names_the_output_that_was_asked_for(tmp_path, monkeypatch, full):
    """A limit on the length of files stands for the disk; which of the outputs exceeds it differs."""
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    state = vit(torch.bfloat16)
    names = "in" if full in ("out", "side") else "in.safetensors"
    if names == "in":
        folder = shards(Path("in"), state)
        (folder / "sub").mkdir()
        (folder / "sub" / "vocab.txt").write_bytes(bytes(100 if full == "out" else 300_000))
    else:
        save_file({"head.weight": state["head.weight"], **state}, names)
    size = {"out": 10_000, "side": 200_000, "masks": 2000, "report": 2000}[full]
    wanted = {
        "out": "out/model-0000",
        "side": "out/sub/vocab.txt",
        "masks": "m.st",
        "report": "r.json",
    }
    if full in ("masks", "report"):
        # OUT is written by C++, the small files by Python: they fail alone under a limit that
        # begins when they are written.
        monkeypatch.setattr(
            {"masks": "dimap.checkpoint.streaming.begin", "report": "dimap.report.Report.to_json"}[
                full
            ],
            fail_for(full),
        )
        with pytest.raises(OSError, match="No space left") as error:
            prune_checkpoint(names, "out.safetensors", 0.5, masks="m.st", report="r.json")
    else:
        soft = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, soft[1]))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                prune_checkpoint(names, "out", 0.5)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert str(error.value.filename).startswith(wanted[full])
    assert os.listdir() == [names]


def test_the_file_of_a_folder_that_is_too_large_is_named(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    torch.save(vit(), "in/pytorch_model.bin")
    (tmp_path / "in" / "config.json").write_text("{}")
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, soft[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            prune_checkpoint("in", "out", 0.5, masks="m.st")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert error.value.filename == "out/pytorch_model.bin"
    assert os.listdir() == ["in"]


def fail_for(full):
    """A write that fails as the system's do: with the path that was opened."""
    from dimap.checkpoint import native

    whole = native.begin

    def begin(output, header, **options):
        if ".m.st." in output[1]:
            raise OSError(28, "No space left on device", output[1])
        whole(output, header, **options)

    def to_json(self, path=None):
        raise OSError(28, "No space left on device")  # as a write says it, without a name

    return begin if full == "masks" else to_json


def test_settings_of_the_index_survive(tmp_path):
    folder = shards(tmp_path / "in", vit())
    prune_checkpoint(folder, tmp_path / "out", 0.5)
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text())["metadata"] == {"total_size": 1}


@pytest.mark.parametrize("source", ["in.safetensors", "in.pth"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_identical_runs_give_identical_files(tmp_path, source, ending):
    """Metadata included, which a library may write in any order."""
    if ending == "pth" and source != "in.pth":
        pytest.skip("torch.save is written from torch.save")
    save_file(vit(), tmp_path / "in.safetensors", {str(n): "" for n in range(8)})
    torch.save(vit(), tmp_path / "in.pth")
    found = set()
    for run in range(4):
        out = tmp_path / str(run)
        out.mkdir()
        prune_checkpoint(
            tmp_path / source,
            out / f"o.{ending}",
            0.5,
            masks=out / "m.safetensors",
            report=out / "r.json",
        )
        found.add(tuple(file.read_bytes() for file in sorted(out.iterdir())))
    assert len(found) == 1
