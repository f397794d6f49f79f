"""What goes wrong while a checkpoint is streamed: IN is never changed, OUT never partial."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import dimap
import pytest
import torch

pytest.importorskip("safetensors")

from checkpoints import assert_same, load_folder, shards, vit
from dimap.checkpoint import open_checkpoint
from dimap.stream import prune_checkpoint
from safetensors.torch import save_file

# The first piece to be written says so, and waits until standard input is closed.
PRUNE = """
import os, signal, sys, time
from dimap import stream
class Progress:
    done = 0
    def step(self, description, total=None):
        self.writing = description == "writing"
    def advance(self, amount):
        if self.writing:
            os.write(1, b"writing\\n")  # at once, whatever another thread writes
            {then}
{before}
stream.prune_checkpoint(sys.argv[1], sys.argv[2], 0.55, progress=Progress())
"""


def start(source, out, *, before="", then="os.read(0, 1)"):
    command = [sys.executable, "-c", PRUNE.format(before=before, then=then), str(source), str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(params=["file", "folder"])
def case(request, tmp_path):
    """IN, OUT, and a function that asserts that IN is as it was and OUT is not there."""
    state = vit(torch.bfloat16, width=64)
    if request.param == "file":
        source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        save_file(state, source)
        files = [source]
    else:
        source, out = shards(tmp_path / "in", state), tmp_path / "out"
        files = sorted(source.iterdir())
    before = {file: file.read_bytes() for file in files}

    def untouched(left=0):
        assert {file: file.read_bytes() for file in files} == before
        assert not out.exists()
        others = [p for p in tmp_path.iterdir() if p != source]
        assert len(others) == left, others

    return source, out, untouched


def test_killed_in_the_middle_and_cleaned_up_by_the_next_run(case):
    source, out, untouched = case
    process = start(source, out)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.communicate()
    untouched(left=1)  # the temporary, under a name of its own
    prune_checkpoint(source, out, 0.55)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([source.name, out.name])


def test_a_running_program_keeps_its_temporary(case):
    source, out, _ = case
    process = start(source, out)
    assert process.stdout.readline() == "writing\n"
    prune_checkpoint(source, out, 0.3)
    _, error = process.communicate()
    assert "FileExistsError" in error  # the other one was first: it is not overwritten
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([source.name, out.name])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_interrupted_in_the_middle(case, number):
    source, out, untouched = case
    # As in a terminal, even where the tests run in the background: there SIGINT is ignored.
    handler = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "signal.signal(signal.SIGINT, signal.default_int_handler)"
    )
    # The signal comes in the middle for certain; a thread that writes leaves time to hear of it.
    then = f"os.kill(os.getpid(), {int(number)}); time.sleep(0.3)"
    process = start(source, out, before=handler, then=then)
    _, error = process.communicate()
    assert process.returncode == (-number if number == signal.SIGINT else 143), error
    untouched()


def test_disk_full(case):
    """A limit on the length of files: what the system refuses, as on a full disk, is a write."""
    source, out, untouched = case
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = start(source, out, before=limit)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "File too large" in error
    assert str(out.parent) in error
    untouched()


@pytest.mark.parametrize("when", ["reading", "writing"])
def test_the_input_ends_early(case, when):
    source, out, _ = case
    file = source if source.is_file() else sorted(source.glob("*.safetensors"))[-1]

    class Progress:
        def step(self, description, total=None):
            if description == when:
                os.truncate(file, 30_000)

        def advance(self, amount):
            pass

    with pytest.raises(OSError, match="must not change while it is read") as error:
        prune_checkpoint(source, out, 0.55, progress=Progress())
    assert error.value.filename == str(file)
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1


def test_the_input_changes_between_the_readings(case):
    source, out, _ = case
    file = source if source.is_file() else sorted(source.glob("*.safetensors"))[-1]

    class Progress:
        def step(self, description, total=None):
            if description == "writing":
                data = bytearray(file.read_bytes())
                data[-40_000:] = bytes(40_000)
                file.write_bytes(data)

        def advance(self, amount):
            pass

    with pytest.raises(ValueError, match="must not change while it is read"):
        prune_checkpoint(source, out, 0.55, progress=Progress())
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1


def test_a_read_error_of_the_system(tmp_path, monkeypatch):
    """The system's own error: a descriptor that cannot be read."""
    from dimap.checkpoint import streaming

    source = tmp_path / "in.safetensors"
    save_file(vit(), source)
    opened = streaming.opened
    monkeypatch.setattr(
        streaming, "opened", lambda paths, flags: opened(paths, flags or os.O_WRONLY)
    )
    with pytest.raises(OSError, match="Bad file descriptor") as error:
        prune_checkpoint(source, tmp_path / "out.safetensors", 0.5)
    assert error.value.filename == str(source)
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_links_in_an_old_output_are_not_written_through(tmp_path):
    source = shards(tmp_path / "in", vit())
    precious = tmp_path / "precious"
    precious.write_bytes(b"keep")
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").symlink_to(precious)
    for file in source.glob("*.safetensors"):
        (out / file.name).symlink_to(precious)
    prune_checkpoint(source, out, 0.5, force=True)
    assert precious.read_bytes() == b"keep"
    assert not any(p.is_symlink() for p in out.iterdir())


FILL = """
import errno, os, sys
from pathlib import Path
from dimap.checkpoint import open_checkpoint
from dimap.stream import prune_checkpoint
source, out = Path(sys.argv[1]), Path(sys.argv[2])
masks = out.with_name("masks")
try:
    prune_checkpoint(source, out, 0.55, masks=masks)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    assert error.filename.startswith(str(out.parent)), error.filename
    assert os.listdir(out.parent) == [], os.listdir(out.parent)
    print("full")
"""


def test_disk_really_full(case, tmp_path):
    """A file system of 160 kB: OUT has 250 and more, most of it written by several threads."""
    source, _, untouched = case
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=160k none {disk} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a file system of its own")
    ended = subprocess.run(
        [*command, sys.executable, "-c", FILL, str(source), str(disk / "out")]
        if source.is_dir()
        else [*command, sys.executable, "-c", FILL, str(source), str(disk / "out.safetensors")],
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, "full\n"), ended.stderr
    disk.rmdir()
    untouched()


def test_disk_full_while_other_files_are_copied(tmp_path):
    resource = pytest.importorskip("resource")
    source = shards(tmp_path / "in", vit())
    (source / "tokenizer.json").write_bytes(b"x" * 500_000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            prune_checkpoint(source, tmp_path / "out", 0.5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def refuse(source, out, match, **options):
    """Refused at once, by force too; everything there is as it was."""
    home = Path(os.path.commonpath([source, out]))
    files = [p for p in home.rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    for force in (False, True):
        with pytest.raises(ValueError, match=match):
            prune_checkpoint(source, out, 0.5, force=force, **options)
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file()} == before


def test_in_is_out_through_links(tmp_path):
    source = shards(tmp_path / "in", vit())
    single = tmp_path / "in.safetensors"
    save_file(vit(), single)
    (tmp_path / "folder").symlink_to(source)
    (tmp_path / "file.safetensors").symlink_to(single)
    (tmp_path / "home").symlink_to(tmp_path)
    for one, other in (
        (source, tmp_path / "folder"),
        (tmp_path / "folder", source),
        (source, tmp_path / "home" / "in"),
        (single, tmp_path / "file.safetensors"),
        (tmp_path / "file.safetensors", single),
        (tmp_path / "home" / "in.safetensors", single),
    ):
        refuse(one, other, "must not be the checkpoint that is read")
    refuse(source, tmp_path / "folder" / "out", "must lie apart")
    refuse(tmp_path / "folder", source / "sub" / ".." / "out", "must lie apart")
    refuse(tmp_path / "folder", tmp_path / "home", "must lie apart")


def test_masks_are_neither_in_nor_out(tmp_path):
    source = shards(tmp_path / "in", vit())
    single, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(vit(), single)
    (tmp_path / "link").symlink_to(single)
    for masks in (single, tmp_path / "link" / ".." / "in.safetensors", out):
        refuse(single, out, "masks must lie apart from", masks=masks)
    for masks in (source / "masks", source / "config.json", tmp_path / "out" / "m"):
        refuse(source, tmp_path / "out", "masks must lie apart from", masks=masks)


def test_a_folder_of_links_is_followed_and_not_written_through(tmp_path):
    """As in the cache of a hub, where all files are links to blobs; OUT is a link to elsewhere."""
    real = shards(tmp_path / "real", vit())
    source = tmp_path / "in"
    source.mkdir()
    for file in real.iterdir():
        (source / file.name).symlink_to(file)
    before = {p: p.read_bytes() for p in real.iterdir()}
    elsewhere = shards(tmp_path / "elsewhere", vit(seed=5))
    (tmp_path / "out").symlink_to(elsewhere)
    precious = {p: p.read_bytes() for p in elsewhere.iterdir()}
    prune_checkpoint(source, tmp_path / "out", 0.5, force=True)
    assert {p: p.read_bytes() for p in real.iterdir()} == before
    assert {p: p.read_bytes() for p in elsewhere.iterdir()} == precious
    out = tmp_path / "out"
    assert not out.is_symlink()
    assert not any(p.is_symlink() for p in out.iterdir())
    want = vit()
    dimap.prune(want, 0.5)
    assert_same(load_folder(out), want)


def test_a_temporary_of_somebody_else_is_kept(tmp_path):
    """Only names of the exact form, for this very output, are taken for leftovers."""
    source = tmp_path / "in.safetensors"
    save_file(vit(), source)
    others = [
        ".out.safetensors.0123456.dimap-tmp", ".out.safetensors.0123456g.dimap-tmp",
        ".other.safetensors.01234567.dimap-tmp", "out.safetensors.01234567.dimap-tmp",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("")
    (tmp_path / "precious").write_text("keep")
    (tmp_path / ".out.safetensors.01234567.dimap-tmp").write_text("left")
    (tmp_path / ".out.safetensors.76543210.dimap-tmp").symlink_to(tmp_path / "precious")
    prune_checkpoint(source, tmp_path / "out.safetensors", 0.5)
    left = [p.name for p in tmp_path.iterdir() if p.name.endswith("dimap-tmp")]
    assert {*others} <= {*left}
    assert ".out.safetensors.01234567.dimap-tmp" not in left
    assert (tmp_path / "precious").read_text() == "keep"


def test_pickled_files_are_mapped_and_hold_no_code(tmp_path):
    """The system lists the file among what is mapped; a file with code is refused unread."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    path = tmp_path / "in.pth"
    torch.save({"model": vit()}, path)
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint, open("/proc/self/maps") as maps:
        assert str(path) in maps.read()
        prune_checkpoint(checkpoint, tmp_path / "out.pth", 1.0)
    assert path.read_bytes() == before  # what is written is the mapping's private copy
    torch.save({"model": vit(), "code": Touch(tmp_path / "run")}, path)
    with pytest.raises(ValueError, match="weights_only=True"):
        open_checkpoint(path)
    assert not (tmp_path / "run").exists()


class Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("head", ["huge", "overlap", "outside", "twice"])
def test_a_hostile_shard_leaves_nothing(tmp_path, head):
    """Through the whole program: one clear line, and neither OUT nor a temporary."""
    source = shards(tmp_path / "in", vit())
    shard = sorted(source.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    if head == "overlap":
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    elif head == "outside":
        size = len(data)
        header[names[-1]]["data_offsets"] = [size, size + 128]
        header[names[-1]] |= {"shape": [32], "dtype": "F32"}
    text = json.dumps(header)
    if head == "twice":
        text = text[:-1] + f', "{names[0]}": ' + json.dumps(header[names[0]]) + "}"
    count = (2**63 if head == "huge" else len(text)).to_bytes(8, "little")
    shard.write_bytes(count + text.encode() + data[8 + length :])
    with pytest.raises(ValueError, match=str(shard)):
        prune_checkpoint(source, tmp_path / "out", 0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_an_index_that_names_a_tensor_twice(tmp_path):
    source = shards(tmp_path / "in", vit())
    index = source / "model.safetensors.index.json"
    one, two = (p.name for p in sorted(source.glob("*.safetensors"))[:2])
    text = index.read_text().replace(f'"{one}"', f'"{two}", "cls_token": "{one}"', 1)
    index.write_text(text)
    with pytest.raises(ValueError, match="cls_token twice"):
        prune_checkpoint(source, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"]
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_nan_in_what_is_never_pruned_is_a_note(tmp_path, dtype, ending):
    state = vit()
    state["norm.weight"] = torch.tensor(
        [1.0, math.inf, -math.inf] if "e4m3" not in dtype else [448.0]
    )
    state["norm.weight"] = state["norm.weight"].to(getattr(torch, dtype))
    state["norm.bias"] = torch.tensor([0.0, math.nan]).to(getattr(torch, dtype))
    state["count"] = torch.tensor([-1])  # all bits of a number that is none
    source, out = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    (save_file if ending == "safetensors" else torch.save)(state, source)
    notes = prune_checkpoint(source, out, 0.5).notes
    assert notes == ["norm.bias, which is never pruned, holds a NaN"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_what_is_not_finite_is_named_with_its_sign(tmp_path, dtype, value, ending):
    state = vit(dtype)
    state["blocks.1.attn.proj.weight"][0, 3] = value
    source = tmp_path / f"in.{ending}"
    (save_file if ending == "safetensors" else torch.save)(state, source)
    with pytest.raises(ValueError, match=f"weight must be finite, got {value} at flat index 3"):
        prune_checkpoint(source, tmp_path / f"out.{ending}", 0.5)
