"""Files are pruned, expanded and inspected without torch; every dtype of safetensors passes through."""

from __future__ import annotations

import json
import subprocess
import sys

import dimap
import pytest
import torch
from checkpoints import FORMATS, shards, vit
from dimap.bitmask import expand
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.header import DTYPES, dtype_of
from dimap.checkpoint.inspect import inspect
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file

WORK = """
import sys
from pathlib import Path
import dimap
from dimap.bitmask import expand
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.inspect import inspect
from dimap.checkpoint.base import Silent
from dimap.stream import prune_checkpoint
source, home = sys.argv[1], Path(sys.argv[2])
prune_checkpoint(source, home / "packed", 0.55, masks=home / "masks", report=home / "report.json",
                 format=sys.argv[3])
expand(home / "packed", home / "dense")
for kind in ("dense", "packed"):
    with open_checkpoint(home / kind) as checkpoint:
        print(inspect(checkpoint, Silent()).total.nonzero)
print(sorted({"torch", "numpy", "rich", "timm"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("form", FORMATS[1:])
def test_a_process_that_works_on_files_imports_no_torch(tmp_path, form):
    state = vit()
    source = shards(tmp_path / "in", state)
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(source), str(tmp_path), form],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    nonzero, again, modules = done.stdout.splitlines()
    pruned = dimap.prune(state, 0.55)
    assert int(nonzero) == int(again) == sum(pruned.nonzero.values())
    assert modules == "[]"


KNOWN = [
    d for d in DTYPES.values() if d.size and isinstance(getattr(torch, d.name, None), torch.dtype)
]


@pytest.mark.parametrize("dtype", KNOWN, ids=lambda d: d.code)
def test_nonzero_elements_of_every_dtype_are_those_that_torch_finds(tmp_path, dtype):
    """All bytes there are, as bits of elements: zeros, negative zeros, infinities, NaNs."""
    assert dtype_of(dtype.torch()) == dtype
    raw = torch.arange(256, dtype=torch.uint8).repeat(8)
    raw[: 2 * dtype.size] = 0
    if dtype.code == "BOOL":
        raw = (raw > 100).to(torch.uint8)
    raw[dtype.size - 1] = 0x80 if dtype.is_floating_point else 0
    odd = raw.view(dtype.torch())
    save_file(vit() | {"head.bias": odd}, tmp_path / "in.safetensors")
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)
    after = load_file(tmp_path / "out.safetensors")["head.bias"]
    assert bytes(after.view(torch.uint8)) == bytes(raw)
    with open_checkpoint(tmp_path / "in.safetensors") as checkpoint:
        assert bytes(checkpoint.get("head.bias").view(torch.uint8)) == bytes(raw)
        if "head.bias" not in checkpoint.shapes():
            return  # not taken for a parameter
        (aux,) = (m for m in inspect(checkpoint, Silent()).modules if m.name == "aux")
    counted = next(layer.nonzero for layer in aux.layers if layer.name.startswith("head.bias"))
    # Of the type itself torch cannot count zeros everywhere; its numbers are exact in float64.
    wanted = odd.numel() if dtype.mask == 0 else int((odd.to(torch.float64) != 0).sum())
    assert counted == wanted


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("form", FORMATS)
def test_elements_of_less_than_a_byte_pass_through(tmp_path, code, form):
    save_file(vit(), tmp_path / "plain.safetensors")
    data = (tmp_path / "plain.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, size = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    packed = bytes(range(24))
    shape = [8 * 24 // DTYPES[code].bits]
    header["scales"] = {"dtype": code, "shape": shape, "data_offsets": [size, size + 24]}
    text = json.dumps(header).encode()
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + packed)
    prune_checkpoint(source, out, 0.55, format=form)
    if form != "dense":
        expand(out, tmp_path / "back.safetensors")
        out = tmp_path / "back.safetensors"
    assert out.read_bytes().endswith(packed)
    assert out.stat().st_size == source.stat().st_size


def test_an_odd_number_of_half_bytes_is_refused(tmp_path):
    text = b'{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}'
    (tmp_path / "in.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(ValueError, match="bytes apart for F4"):
        open_checkpoint(tmp_path / "in.safetensors")
