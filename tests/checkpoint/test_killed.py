"""kill -9 at every kind of moment: IN as it was, OUT absent, old or complete; the next run tidies."""

from __future__ import annotations

import subprocess
import sys

import forked
import pytest
import torch

pytest.importorskip("safetensors")

from checkpoints import shards, vit
from safetensors.torch import save_file

# Children that are forked before any thread is there die before the n-th call that the system sees.
SCRIPT = """
import json, os, shutil, signal, sys, threading
from pathlib import Path

import torch
from dimap.stream import prune_checkpoint

source, old = Path(sys.argv[1]), sys.argv[2] == "old"
home = source.parent
out, masks = home / ("out" + source.suffix), home / "masks.safetensors"
CALLS = "open mkdir ftruncate preadv pwrite fsync replace rename unlink rmdir".split()


def prune(moment):
    "The calls that were made, or none where the child was killed."
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        count, lock = 0, threading.Lock()

        def counted(call):
            def wrapped(*arguments, **options):
                nonlocal count
                with lock:
                    count += 1
                    if count == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)
            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            if source.suffix == ".pth":
                prune_checkpoint(source, out, 0.55, force=True)
            else:
                prune_checkpoint(source, out, 0.55, masks=masks, force=True)
            os.write(writer, str(count).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        told = file.read()
    assert os.waitstatus_to_exitcode(status) == (0 if told else -9), (moment, status)
    return int(told or 0)


def content(path):
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    return {p.name: p.read_bytes() for p in path.iterdir()}


def lay(path, what):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True) if not path.is_dir() else None
    if isinstance(what, dict):
        path.mkdir()
        for name, data in what.items():
            (path / name).write_bytes(data)
    elif what is not None:
        path.write_bytes(what)


given = content(source)
before = {out: given if old else None, masks: b"old" if old else None}
total = 0
for path in before:
    lay(path, before[path])
total = prune(0)
after = {path: content(path) for path in before}
assert total > 4 and after[out] not in (None, given)
moments = sorted({*range(1, total, max(1, total // 10)), *range(max(1, total - 9), total + 1)})
seen = set()
for moment in moments:
    for path in before:
        lay(path, before[path])
    if prune(moment):
        continue  # the last calls: threads make a few more or less each time
    assert content(source) == given, moment
    for path in before:
        found = content(path)
        # An old folder is moved away before the new one comes.
        absent = found is None and old and isinstance(given, dict)
        assert absent or found in (before[path], after[path]), (moment, path.name)
        seen.add((path.name, "absent" if found is None else "new" if found == after[path] else "old"))
    prune(0)
    assert {path: content(path) for path in before} == after, moment
    assert {p for p in home.iterdir()} <= {source, out, masks}, (moment, list(home.iterdir()))
print(json.dumps([total, len(moments), sorted(seen)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    ("form", "place"),
    [("in.safetensors", "old"), ("in", "free"), ("in", "old"), ("in.pth", "free")],
)
def test_killed_at_any_moment(tmp_path, form, place):
    state = vit(torch.bfloat16)
    source = tmp_path / form
    if form == "in":
        shards(source, state)
    elif form == "in.pth":
        torch.save(state, source)
    else:
        save_file(state, source)
    ended = subprocess.run(
        [forked.python(), "-c", SCRIPT, str(source), place], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    # It was killed before and after OUT came.
    assert f'["out{source.suffix}", "new"]' in ended.stdout
    assert f'["out{source.suffix}", "{"old" if place == "old" else "absent"}"]' in ended.stdout
