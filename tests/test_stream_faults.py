"""What goes wrong while a checkpoint is streamed: IN is never changed, OUT never partial."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("safetensors")

from dimap.stream import prune_checkpoint
from safetensors.torch import save_file
from test_stream import shards, vit

# Slow enough to be hit: the first piece to be written says so and waits.
PRUNE = """
import sys, time
from dimap import stream
class Progress:
    done = 0
    def step(self, description, total=None):
        self.writing = description == "writing"
    def advance(self, amount):
        if self.writing:
            print("writing", flush=True)
            time.sleep(float(sys.argv[3]))
{before}
stream.prune_checkpoint(sys.argv[1], sys.argv[2], 0.55, progress=Progress())
"""


def start(source, out, *, before="", wait="30"):
    command = [sys.executable, "-c", PRUNE.format(before=before), str(source), str(out), wait]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    process.wait()
    untouched(left=1)  # the temporary, under a name of its own
    prune_checkpoint(source, out, 0.55)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted([source.name, out.name])


def test_a_running_program_keeps_its_temporary(case):
    source, out, _ = case
    process = start(source, out, wait="2")
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
    process = start(source, out, before=handler, wait="0.3")
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.05)
    process.send_signal(number)
    process.wait()
    assert process.returncode != 0
    untouched()


def test_disk_full(case):
    """A limit on the length of files: what the system refuses, as on a full disk, is a write."""
    source, out, untouched = case
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = start(source, out, before=limit, wait="0")
    _, error = process.communicate()
    assert process.returncode == 1
    assert "File too large" in error
    assert str(out.parent) in error
    untouched()


@pytest.mark.parametrize("when", ["surveying", "writing"])
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
    """The system's own error: a descriptor that cannot be read, from the second piece on."""
    from dimap import _stream_io

    source = tmp_path / "in.safetensors"
    save_file(vit(), source)
    monkeypatch.setattr(_stream_io, "PIECE", 4096)
    broken = os.open(tmp_path / "in.safetensors", os.O_WRONLY)
    calls, original = [], _stream_io.read_into

    def read_into(descriptor, memory, begin, path):
        calls.append(begin)
        original(broken if len(calls) > 5 else descriptor, memory, begin, path)

    monkeypatch.setattr(_stream_io, "read_into", read_into)
    with pytest.raises(OSError, match="Bad file descriptor") as error:
        prune_checkpoint(source, tmp_path / "out.safetensors", 0.5)
    os.close(broken)
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
