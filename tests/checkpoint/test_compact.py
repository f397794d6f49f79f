"""Compact files: read by what docs/format.md says, and refused where a byte of them is another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zlib
from itertools import pairwise
from pathlib import Path

import dimap
import numpy as np
import pytest
import torch
import torch.distributed as dist
import zstandard
from dimap import _C
from dimap.bitmask import expand
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.header import DTYPES
from dimap.checkpoint.inspect import inspect
from dimap.stream import prune_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from checkpoints import assert_same, vit
from ranks import Group
from safetensors.torch import load_file, save_file

QKV, PROJ = "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight"


# A reader and a writer by docs/format.md alone


def parts_of(path):
    """The file's metadata, and of each tensor its bytes."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    return metadata, {n: data[start:][slice(*t["data_offsets"])] for n, t in header.items()}


def join(path, metadata, parts):
    header, at = {"__metadata__": metadata}, 0
    for name, data in parts.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts.values()))


def rows_and_frames(data):
    count = int.from_bytes(data[-8:-4], "little")
    rows = np.frombuffer(data[-8 - 12 * count : -8], "<u4").reshape(count, 3).tolist()
    ends = np.cumsum([0] + [row[1] for row in rows])
    return rows, [data[a:b] for a, b in pairwise(ends)]


def tensor_of(name, rows, frames, count=None):
    """The stored bytes of a tensor, its checksum right."""
    table = np.array(rows, "<u4").tobytes()
    count = len(rows) if count is None else count
    check = zlib.crc32(name.encode() + table)
    return b"".join(frames) + table + count.to_bytes(4, "little") + check.to_bytes(4, "little")


def dense_of(path):
    """The dense file's bytes."""
    metadata, parts = parts_of(path)
    assert metadata.pop("dimap_bitmask") == "2"
    text = metadata.pop("dimap_dense").encode()
    assert metadata.pop("dimap_sha256") == hashlib.sha256(text).hexdigest()
    out = len(text).to_bytes(8, "little") + text
    header = json.loads(text)
    assert header.pop("__metadata__", {}) == metadata
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = DTYPES[told["dtype"]].size
        rows, frames = rows_and_frames(parts[name])
        assert tensor_of(name, rows, frames) == parts[name]
        for (n, length, check), frame in zip(rows, frames, strict=True):
            assert (length, check) == (len(frame), int.from_bytes(frame[-4:], "little"))
            content = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
            bits = np.unpackbits(content[: -(-n // 8)], bitorder="little")[:n].astype(bool)
            planes = content[-(-n // 8) :].reshape(size, -1)
            values = np.ascontiguousarray(planes.T).view(f"<u{size}").reshape(-1)
            dense = np.zeros(n, f"<u{size}")
            dense[bits] = values >> np.array(1, values.dtype) | values << np.array(
                8 * size - 1, values.dtype
            )
            out += dense.tobytes()
    return out


def test_the_example_of_the_document():
    content = bytes.fromhex("05 0001 0000 0000 7f80")
    assert _C.split(np.array([1.0, 0.0, -2.0], "<f4").tobytes(), 4) == content
    out = bytearray(12)
    _C.merge(content, 4, out)
    assert np.frombuffer(out, "<f4").tolist() == [1.0, 0.0, -2.0]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 300), st.integers(0, 3), st.data())
def test_split_and_merge_keep_every_bit(size, count, shift, data):
    """Elements anywhere in memory, and repeated until they are more than a step of the loops."""
    kind = np.dtype(f"<u{size}")
    some = data.draw(st.lists(st.integers(0, (1 << 8 * size) - 1), min_size=count, max_size=count))
    zeros = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    elements = np.tile(np.where(zeros, np.array(0, kind), np.array(some, kind)).astype(kind), 30)
    content = _C.split(memoryview(bytes(shift) + elements.tobytes())[shift:], size)
    stored = elements[elements != 0]
    turned = stored << np.array(1, kind) | stored >> np.array(8 * size - 1, kind)
    planes = turned.view(np.uint8).reshape(-1, size).T.tobytes()
    assert content == np.packbits(elements != 0, bitorder="little").tobytes() + planes
    out = bytearray(shift + elements.nbytes)
    _C.merge(content, size, memoryview(out)[shift:])
    assert out[shift:] == elements.tobytes()


def small():
    state = {"w": torch.zeros(40), "b": torch.ones(3), "none": torch.zeros(0)}
    state["w"][::3] = torch.arange(14.0) - 3
    return state | {"ids": torch.arange(300), "half": torch.randn(21).half(), "one": torch.ones(())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_document_says_how_to_read_it(tmp_path, dtype):
    save_file(vit(dtype) | small(), tmp_path / "in.safetensors", {"ü": "✓"})
    for form in ("dense", "compact"):
        prune_checkpoint(
            tmp_path / "in.safetensors", tmp_path / f"{form}.safetensors", 0.55, format=form
        )
    dense = (tmp_path / "dense.safetensors").read_bytes()
    assert dense_of(tmp_path / "compact.safetensors") == dense


def test_several_blocks_written_and_read_by_any_number_of_threads(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(3, 700_001, generator=generator), "b": torch.zeros(1_100_003)}
    state["w"][torch.rand(state["w"].shape, generator=generator) < 0.6] = 0
    save_file(state, tmp_path / "in.safetensors")
    files = []
    for threads in ("1", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        saved, pruned = tmp_path / f"saved{threads}", tmp_path / f"pruned{threads}.safetensors"
        dimap.save_file(state, saved, format="compact")
        assert_same(dimap.load_file(saved), state)
        options = {"patterns": {"all": "w"}, "format": "compact"}
        prune_checkpoint(tmp_path / "in.safetensors", pruned, 0.7, **options)
        expand(pruned, tmp_path / f"back{threads}.safetensors")
        files.append([p.read_bytes() for p in (saved, pruned)])
    assert files[0] == files[1]
    assert len(rows_and_frames(parts_of(saved)[1]["w"])[0]) > 3
    back = tmp_path / "back1.safetensors"
    assert dense_of(pruned) == back.read_bytes() == (tmp_path / "back5.safetensors").read_bytes()
    dense = tmp_path / "dense.safetensors"
    prune_checkpoint(tmp_path / "in.safetensors", dense, 0.7, patterns={"all": "w"})
    assert back.read_bytes() == dense.read_bytes()


def test_it_is_smaller_than_a_bitmask_file(tmp_path):
    weights = {"w": torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()}
    dimap.prune(weights, 0.55, patterns={"all": "w"})
    sizes = []
    for form in ("bitmask", "compact"):
        dimap.save_file(weights, tmp_path / form, format=form)
        sizes.append((tmp_path / form).stat().st_size / weights["w"].nbytes)
    assert 0.51 < sizes[0] < 0.52
    assert sizes[1] < 0.35


def test_inspect_counts_what_the_dense_file_has(tmp_path):
    state = vit() | {"head.bias": torch.tensor([0.0, -0.0, 1.0, -2.0])}
    save_file(state, tmp_path / "in.safetensors")
    told = []
    for form in ("dense", "compact"):
        out = tmp_path / f"{form}.safetensors"
        prune_checkpoint(tmp_path / "in.safetensors", out, 0.55, format=form)
        with open_checkpoint(out) as checkpoint:
            told.append([m.to_dict() for m in inspect(checkpoint, Silent()).modules])
            assert torch.equal(checkpoint.get("head.bias"), state["head.bias"])
    assert told[0] == told[1]


# What is refused


@pytest.fixture
def packed(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors", {"format": "pt"})
    prune_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "packed.safetensors", 0.55, format="compact"
    )
    return tmp_path / "packed.safetensors"


def refused(path, message):
    """By `load_file`, `inspect` and `expand`, which leaves nothing."""
    left = sorted(p.name for p in path.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        dimap.load_file(path)
    with pytest.raises(ValueError, match=message), open_checkpoint(path) as checkpoint:
        inspect(checkpoint, Silent())
    with pytest.raises(ValueError, match=message):
        expand(path, path.with_name("back.safetensors"))
    assert sorted(p.name for p in path.parent.iterdir()) == left


def frame(content, **more):
    return zstandard.ZstdCompressor(write_checksum=True, **more).compress(content)


def row(n, made):
    return [n, len(made), int.from_bytes(made[-4:], "little")]


def claims(size):
    """A frame of zeros that says it holds `size` bytes."""
    made = frame(bytes(1000), write_content_size=False)
    assert made[4] == 0b00000100  # a window, a checksum, no size
    return made[:4] + bytes([0b11100100]) + size.to_bytes(8, "little") + made[6:]


ZEROS = frame(bytes(3072 // 8))  # 3072 weights, all of them 0
BLOCKS = {
    "none": ([], [], "3072 elements in blocks, got 0"),
    "too few elements": ([row(3064, ZEROS)], [ZEROS], "3072 elements in blocks, got 3064"),
    "no elements": ([row(0, ZEROS), row(3072, ZEROS)], [ZEROS] * 2, "in a block, got 0"),
    "a huge block": ([row(1 << 23, ZEROS)], [ZEROS], "at most 16777216 bytes in a block"),
    "frames too short": ([row(3072, ZEROS)], [ZEROS[:-1]], "bytes in blocks"),
    "bytes left": ([row(3072, ZEROS)], [ZEROS, b"more"], "bytes in blocks"),
    "another checksum": ([[3072, len(ZEROS), 7]], [ZEROS], "an undamaged block .*another in its"),
    "no zstd": ([row(3072, b"12345678")], [b"12345678"], "an undamaged block"),
    "an empty frame": ([[3072, 0, 0]], [b""], "an undamaged block"),
    "no checksum": (
        [row(3072, zstandard.compress(bytes(384)))],
        [zstandard.compress(bytes(384))],
        "an undamaged block .*without a checksum",
    ),
    "two frames": ([row(3072, ZEROS * 2)], [ZEROS * 2], "an undamaged block"),
    "too many bytes": (
        [row(3072, frame(bytes(384 + 4 * 3073)))],
        [frame(bytes(384 + 4 * 3073))],
        "an undamaged block .*12676 bytes",
    ),
    "too few bytes": ([row(3072, frame(bytes(383)))], [frame(bytes(383))], "383 bytes"),
    "a size of frames that lies": (
        [row(3072, claims(1 << 60))],
        [claims(1 << 60)],
        f"an undamaged block .*{1 << 60} bytes",
    ),
    "a size of frames that lies a little": (
        [row(3072, claims(384))],
        [claims(384)],
        "an undamaged block",
    ),
    "no size of frames": (
        [row(3072, frame(bytes(384), write_content_size=False))],
        [frame(bytes(384), write_content_size=False)],
        "an undamaged block",
    ),
    "a bomb": (
        [row(3072, frame(bytes(1 << 28)))],
        [frame(bytes(1 << 28))],
        "an undamaged block .*268435456 bytes",
    ),
    "values without bits": (
        [row(3072, frame(bytes(384 + 4)))],
        [frame(bytes(384 + 4))],
        "as many values as its bits say, 0, got 1",
    ),
    "bits without values": (
        [row(3072, frame(b"\x01" + bytes(383)))],
        [frame(b"\x01" + bytes(383))],
        "as many values as its bits say, 1, got 0",
    ),
    "a part of a value": (
        [row(3072, frame(bytes(386)))],
        [frame(bytes(386))],
        "as many values as its bits say",
    ),
    "unused bits": (
        [row(3065, frame(bytes(383) + b"\x80")), row(7, frame(b"\0"))],
        [frame(bytes(383) + b"\x80"), frame(b"\0")],
        "zeros in the unused bits",
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_are_refused_by_the_name_of_their_tensor(packed, case):
    rows, frames, message = BLOCKS[case]
    metadata, parts = parts_of(packed)
    parts[QKV] = tensor_of(QKV, rows, frames)
    join(packed, metadata, parts)
    refused(packed, f"packed.safetensors: {QKV} must .*{message}")


def test_blocks_that_fit_are_read(packed):
    """That the cases above are refused for what they say."""
    metadata, parts = parts_of(packed)
    parts[QKV] = tensor_of(QKV, [row(3064, frame(bytes(383))), row(8, frame(b"\0"))], [frame(bytes(383)), frame(b"\0")])  # fmt: skip
    join(packed, metadata, parts)
    assert not dimap.load_file(packed)[QKV].any()


def other_name(metadata, parts):
    parts[QKV], parts["blocks.1.attn.qkv.weight"] = parts["blocks.1.attn.qkv.weight"], parts[QKV]


def blocks_swapped(metadata, parts):
    rows, frames = [row(3072 - 8, f := frame(bytes(383))), row(8, g := frame(b"\0"))], [g, f]
    parts[QKV] = tensor_of(QKV, rows, frames)


def rows_beyond(metadata, parts):
    parts[QKV] = tensor_of(QKV, [], [], count=1 << 31)


def dense(metadata, edit):
    header = json.loads(metadata["dimap_dense"])
    edit(header)
    metadata["dimap_dense"] = text = json.dumps(header)
    metadata["dimap_sha256"] = hashlib.sha256(text.encode()).hexdigest()


def huge(metadata, parts):
    def edit(header):
        last = max(header, key=lambda n: header[n].get("data_offsets", [0]))
        header[last]["shape"][0] <<= 40
        header[last]["data_offsets"][1] += (
            header[last]["data_offsets"][1] - header[last]["data_offsets"][0]
        ) * ((1 << 40) - 1)

    dense(metadata, edit)


OTHERS = {
    "two tensors swapped": (other_name, f"{QKV} must tell its own blocks, got a wrong checksum"),
    "two blocks swapped": (blocks_swapped, f"{QKV} must have an undamaged block"),
    "more rows than bytes": (rows_beyond, f"{QKV} must have 2147483648 blocks, got 8 bytes"),
    "nothing": (lambda m, p: p.update({QKV: b"1234"}), f"{QKV} must end with what tells its"),
    "a tensor of petabytes": (huge, "elements in blocks, got"),
    "a tensor too few": (lambda m, p: p.pop(QKV), f"must hold every tensor, got no {QKV}"),
    "a tensor too many": (lambda m, p: p.update(more=b"1"), "nothing but its tensors, got 'more'"),
    "no dense header": (lambda m, p: m.pop("dimap_dense"), "must hold the header of its dense"),
    "no digest": (lambda m, p: m.pop("dimap_sha256"), "must hold its dense header undamaged"),
    "another dense header": (
        lambda m, p: m.update(dimap_dense=m["dimap_dense"].replace("[96,32]", "[32,96]")),
        "must hold its dense header undamaged",
    ),
    "other metadata": (lambda m, p: m.update(format="tf"), "undamaged, and its metadata"),
    "a dense file that is none": (
        lambda m, p: dense(m, lambda h: h["__metadata__"].update(dimap_bitmask="1")),
        "must be dense, got metadata of a bitmask file",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_are_refused(packed, case):
    edit, message = OTHERS[case]
    metadata, parts = parts_of(packed)
    edit(metadata, parts)
    join(packed, metadata, parts)
    refused(packed, message)


@pytest.mark.parametrize("dtype", ["F32", "U8"])
def test_a_stored_tensor_is_of_bytes_in_one_dimension(packed, dtype):
    metadata, parts = parts_of(packed)
    state = {n: torch.from_numpy(np.frombuffer(p, np.uint8).copy()) for n, p in parts.items()}
    size = len(parts[QKV]) // 4
    state[QKV] = torch.zeros(size) if dtype == "F32" else torch.zeros(4, size, dtype=torch.uint8)
    save_file(state, packed, metadata)
    refused(packed, f"{QKV} must be blocks, uint8 in one dimension")


@pytest.mark.parametrize("left", [0, 5, 3000, -1])
def test_truncated(packed, left):
    packed.write_bytes(packed.read_bytes()[:left])
    refused(packed, "safetensors file")


def saved():
    with tempfile.TemporaryDirectory() as folder:
        dimap.save_file(small(), Path(folder) / "f", {"who": "me"}, format="compact")
        return (Path(folder) / "f").read_bytes(), dimap.load_file(Path(folder) / "f")


SMALL, STATE = saved()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_byte_may_be_wrong(tmp_path, data):
    """A changed file is refused with a clear error, or says the same: never other weights."""
    path, out = tmp_path / "f.safetensors", tmp_path / "out.safetensors"
    raw = bytearray(SMALL)
    if data.draw(st.booleans()):
        begin, size = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 60))
        raw[begin : begin + size] = data.draw(st.binary(max_size=60))
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    out.unlink(missing_ok=True)
    try:
        found = dimap.load_file(path)
    except ValueError:
        with pytest.raises(ValueError, match=" must "):
            expand(path, out)
        assert not out.exists()
    else:
        if b'"dimap_bitmask"' in raw:
            assert_same(found, STATE)
            expand(path, out)
            assert_same(load_file(out), STATE)


def test_a_read_error_names_the_file(packed, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*packed\.safetensors'"):
        dimap.load_file(packed)
    with pytest.raises(OSError, match=r"Input/output error: '.*packed\.safetensors'"):
        expand(packed, packed.with_name("back.safetensors"))
    assert not packed.with_name("back.safetensors").exists()


def prune_in_group(source, out):
    with pytest.raises(ValueError, match="one process must write with --format compact, got 2"):
        prune_checkpoint(source, out, 0.55, format="compact", group=dist.group.WORLD)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_several_processes_are_refused(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors")
    group = Group(2)
    try:
        group(prune_in_group, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    finally:
        group.close()
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_an_unknown_format_is_refused(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors")
    with pytest.raises(
        ValueError, match="format must be one of dense, bitmask, compact, got 'zip'"
    ):
        prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out", 0.5, format="zip")
    with pytest.raises(ValueError, match="format must be one of bitmask, compact, got 'dense'"):
        dimap.save_file(vit(), tmp_path / "out", format="dense")
