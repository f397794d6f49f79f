"""Bitmask files that are damaged, hostile or half written: refused or not there, never silently wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import dimap
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from checkpoints import FORMATS, assert_same, shards, vit
from dimap.bitmask import expand
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
NAME = "blocks.0.attn.qkv.weight"


def pruned(folder, form):
    source, out = folder / "in.safetensors", folder / "packed.safetensors"
    save_file(vit(), source, {"format": "pt"})
    prune_checkpoint(source, out, 0.55, format=form)
    return out


@pytest.fixture
def packed(tmp_path):
    return pruned(tmp_path, "bitmask")


@pytest.fixture(params=FORMATS[1:])
def form(request):
    return request.param


@pytest.fixture
def either(tmp_path, form):
    return pruned(tmp_path, form)


def change(path, tensors=None, metadata=None, drop=()):
    """Write a bitmask file again with other tensors, and metadata that a function has changed."""
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    found = json.loads(header[8 : 8 + length])["__metadata__"]
    if metadata:
        metadata(found)
    state = load_file(path) | (tensors or {})
    save_file({n: t for n, t in state.items() if n not in drop}, path, found)


def refused(path, message):
    """By `load_file` and by `expand`, which leaves nothing."""
    out = path.with_name("back.safetensors")
    with pytest.raises(ValueError, match=message):
        dimap.load_file(path)
    with pytest.raises(ValueError, match=message):
        expand(path, out)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted({"in.safetensors", path.name})


def dense_header(edit):
    def metadata(found):
        header = json.loads(found["dimap_dense"])
        edit(header)
        found["dimap_dense"] = json.dumps(header)

    return metadata


ONES = torch.ones
HOSTILE = {
    "unknown version": (
        {"metadata": lambda m: m.update(dimap_bitmask="3")},
        "must have bitmask format version 1 or 2, got '3'",
    ),
    "no dense header": (
        {"metadata": lambda m: m.pop("dimap_dense")},
        "must hold the header of its dense file, got none",
    ),
    "a dense header that is no JSON": (
        {"metadata": lambda m: m.update(dimap_dense="{")},
        "its dense header must have a header of JSON",
    ),
    "offsets with a hole": (
        {
            "metadata": dense_header(
                lambda h: h["norm.bias"].update(data_offsets=[1 << 40, (1 << 40) + 128])
            )
        },
        "must begin where the tensor before it ends",
    ),
    "a huge tensor": (
        {"metadata": dense_header(lambda h: h[NAME].update(shape=[1 << 60, 1 << 60]))},
        "must have sizes for a shape",
    ),
    "another shape": (
        {"metadata": dense_header(lambda h: h["norm.bias"].update(shape=[4, 8]))},
        "norm.bias must have shape \\[4, 8\\], got \\[32\\], and no bits",
    ),
    "another dtype": (
        {"metadata": dense_header(lambda h: h["norm.bias"].update(dtype="I32"))},
        "norm.bias must be torch.int32, got torch.float32",
    ),
    "a tensor too many": ({"tensors": {"more": ONES(3)}}, "nothing but its tensors, got 'more'"),
    "bits of nothing": ({"tensors": {"more.bitmask": ONES(3)}}, "got 'more.bitmask'"),
    "a tensor too few": ({"drop": ("norm.bias",)}, "must hold every tensor, got no norm.bias"),
    "no bits": ({"drop": (NAME + ".bitmask",)}, "got \\[1400\\], and no bits"),
    "bits too long": (
        {"tensors": {NAME + ".bitmask": ONES(385, dtype=torch.uint8)}},
        "must be uint8 \\[384\\] for 3072 weights, got torch.uint8 \\[385\\]",
    ),
    "bits of another type": (
        {"tensors": {NAME + ".bitmask": ONES(384, dtype=torch.int8)}},
        "must be uint8 \\[384\\] for 3072 weights, got torch.int8",
    ),
    "more values than weights": ({"tensors": {NAME: ONES(3073)}}, "at most 3072 values"),
    "values of two dimensions": ({"tensors": {NAME: ONES(1400, 1)}}, "in one dimension"),
    "values of another type": ({"tensors": {NAME: ONES(1400).half()}}, "got torch.float16"),
    "a value too few": ({"tensors": {NAME: ONES(1399)}}, f"{NAME} must .* 1400"),
    "a bit too few": (
        {"tensors": {NAME + ".bitmask": torch.zeros(384, dtype=torch.uint8)}},
        f"{NAME} must .*got .*1400",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused(packed, case):
    changes, message = HOSTILE[case]
    change(packed, **changes)
    refused(packed, message)


def test_unused_bits_must_be_zero(tmp_path):
    weights = torch.zeros(3, 101)
    weights[0, 0] = 1.0
    (tmp_path / "in.safetensors").touch()
    dimap.save_file({"w": weights}, tmp_path / "f.safetensors")
    bits = torch.zeros(38, dtype=torch.uint8)
    bits[37] = 0x80
    change(tmp_path / "f.safetensors", {"w.bitmask": bits})
    refused(tmp_path / "f.safetensors", "zeros in the unused bits")


@pytest.mark.parametrize("left", [0, 5, 3000, -1])
def test_truncated(packed, left):
    data = packed.read_bytes()
    packed.write_bytes(data[:left])
    refused(packed, "safetensors file")


def small():
    """A small file's bytes."""
    weights = torch.zeros(40)
    weights[::3] = torch.arange(14.0) + 1
    with tempfile.TemporaryDirectory() as folder:
        dimap.save_file({"w": weights, "b": torch.ones(3)}, Path(folder) / "f")
        return (Path(folder) / "f").read_bytes()


SMALL = small()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_byte_may_be_wrong(tmp_path, data):
    """A changed file is refused with a clear error, or read; `expand` and `load_file` agree."""
    path, out = tmp_path / "f.safetensors", tmp_path / "out.safetensors"
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    out.unlink(missing_ok=True)
    try:
        found = dimap.load_file(path)
    except ValueError:
        found = None
    try:
        expand(path, out)
    except ValueError:
        assert found is None or b'"dimap_bitmask":"1"' not in bytes(raw)
        assert not out.exists()
    else:
        assert_same(load_file(out), found)


def test_an_index_that_does_not_match(tmp_path):
    source = shards(tmp_path / "in", vit())
    folder = tmp_path / "packed"
    prune_checkpoint(source, folder, 0.55, format="bitmask")
    good = json.loads((folder / INDEX).read_text())

    def refuse(index, message):
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            expand(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    dense = json.loads(good["metadata"]["dimap_dense"])
    refuse(good | {"metadata": {}}, "must hold the index of the dense shards")
    refuse(good | {"metadata": {"dimap_dense": "{"}}, "must be JSON")
    other = {n: f for n, f in dense["weight_map"].items() if n != NAME}
    text = json.dumps(dense | {"weight_map": other})
    refuse(good | {"metadata": {"dimap_dense": text}}, f"must name every tensor .* got no {NAME}")
    text = json.dumps(dense | {"weight_map": other | {NAME: "../up.safetensors"}})
    refuse(good | {"metadata": {"dimap_dense": text}}, "files beside it")
    less = {n: f for n, f in good["weight_map"].items() if n != NAME + ".bitmask"}
    refuse(good | {"weight_map": less}, f"must name every tensor .* got no {NAME}.bitmask")


# In the middle of the work

RUN = """
import os, signal, sys
from dimap import bitmask, stream
class Progress:
    writing = False
    def step(self, description, total=None):
        self.writing = description in ("writing", "expanding")
    def advance(self, amount):
        if self.writing and sys.argv[1] != "limit":
            os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            signal.pause()
if sys.argv[1] == "limit":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[2] == "prune":
    stream.prune_checkpoint(sys.argv[3], sys.argv[4], 0.55, format=sys.argv[5], progress=Progress())
else:
    bitmask.expand(sys.argv[3], sys.argv[4], progress=Progress())
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "limit"])
@pytest.mark.parametrize("job", ["prune", "expand"])
def test_ended_in_the_middle(either, form, job, end):
    """Killed, Ctrl-C, or a write refused as on a full disk: no OUT, and the next run leaves no trace."""
    source = either if job == "expand" else either.with_name("in.safetensors")
    before, out = source.read_bytes(), either.with_name("out.safetensors")
    code = RUN if end != "SIGINT" else RUN.replace("signal.pause()", "pass")
    run = subprocess.run(
        [sys.executable, "-c", code, end, job, str(source), str(out), form],
        capture_output=True,
        text=True,
    )
    ends = {"SIGKILL": -signal.SIGKILL, "SIGINT": -signal.SIGINT, "limit": 1}
    assert run.returncode == ends[end], run.stderr
    assert end != "limit" or "File too large" in run.stderr
    assert not out.exists()
    assert source.read_bytes() == before
    left = [p.name for p in either.parent.iterdir() if p.name.endswith(".dimap-tmp")]
    assert len(left) == (end == "SIGKILL")
    if job == "prune":
        prune_checkpoint(source, out, 0.55, format=form)
    else:
        expand(source, out)
    assert sorted(p.name for p in either.parent.iterdir()) == [
        "in.safetensors", "out.safetensors", "packed.safetensors",
    ]  # fmt: skip


class At:
    """Progress that does something when a step begins."""

    def __init__(self, when, what):
        self.when, self.what = when, what

    def step(self, description, total=None):
        if description == self.when:
            self.what()

    def advance(self, amount):
        pass


def test_the_input_changes_while_it_is_pruned(either, form):
    source, out = either.with_name("in.safetensors"), either.with_name("out.safetensors")

    def zero():
        data = bytearray(source.read_bytes())
        data[-40_000:] = bytes(40_000)
        source.write_bytes(data)

    with pytest.raises(ValueError, match="must not change while it is read"):
        prune_checkpoint(source, out, 0.55, format=form, progress=At("writing", zero))
    assert not out.exists()


@pytest.mark.parametrize("when", ["reading the bits", "expanding"])
def test_the_input_changes_while_it_is_expanded(either, form, when):
    if form == "compact" and when != "expanding":
        return  # in one step
    packed = either
    out = packed.with_name("out.safetensors")
    with pytest.raises(OSError, match="must not change while it is read"):
        expand(packed, out, progress=At(when, lambda: os.truncate(packed, 12_000)))
    assert not out.exists()


def test_out_must_lie_apart(packed):
    with pytest.raises(ValueError, match="must not be the checkpoint that is read"):
        expand(packed, packed, force=True)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        expand(packed, packed.with_name("out.pth"))
