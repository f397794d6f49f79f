"""Hostile headers and indexes are refused with a clear error, and nothing else happens."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from dimap.checkpoint.header import parse_header, read_header
from dimap.stream import prune_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load, save


def packed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parse(header, data=8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(packed(text), 8 + len(text) + data, "file")


def test_a_good_header():
    header = parse({"__metadata__": {"a": "b"}, "w": entry(shape=(1, 2))})
    (w,) = header.entries
    assert (w.name, w.dtype.torch(), w.shape) == ("w", torch.float32, (1, 2))
    assert (w.begin, w.end) == (len(header.raw), len(header.raw) + 8)
    assert header.metadata == {"a": "b"}


HOSTILE = {
    "not JSON": (b"{", "JSON"),
    "deep": (b"[" * 100_000, "JSON"),
    "not UTF-8": (b'{"\xff": 1}', "JSON"),
    "a list": (b"[]", "object"),
    "duplicate names": (
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "w twice",
    ),
    "overlap": ({"a": entry(offsets=(0, 8)), "b": entry(offsets=(4, 12))}, "must begin where"),
    "hole": ({"a": entry(shape=[1], offsets=(4, 8))}, "must begin where"),
    "too short": ({"a": entry(shape=[3], offsets=(0, 12))}, "bytes long"),
    "too long": ({"a": entry(shape=[1], offsets=(0, 4))}, "bytes long"),
    "backwards": ({"a": entry(shape=[0], offsets=(8, 0))}, "bytes apart"),
    "negative": ({"a": entry(offsets=(-8, 0))}, "bytes apart"),
    "wrong size": ({"a": entry(dtype="F64")}, "bytes apart"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, "sizes"),
    "huge shape": ({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}, "sizes"),
    "huge offsets": ({"a": entry(offsets=(10**30, 10**30 + 8))}, "bytes apart"),
    "many sizes": ({"a": entry(shape=[1] * 1000)}, "sizes"),
    "a float": ({"a": entry(shape=(2.0,))}, "sizes"),
    "a bool": ({"a": entry(shape=(True, 2))}, "sizes"),
    "unknown type": ({"a": entry(dtype="F3")}, "dtype"),
    "a list of types": ({"a": entry(dtype=["F32"])}, "dtype"),
    "more keys": ({"a": entry() | {"more": 1}}, "must have dtype"),
    "no object": ({"a": 1}, "must have dtype"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, "strings"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused(name):
    header, message = HOSTILE[name]
    with pytest.raises(ValueError, match=message):
        parse(header)


@pytest.mark.parametrize("head", [b"", b"\0" * 8, b"\xff" * 8, (10**8 + 1).to_bytes(8, "little")])
def test_a_length_that_cannot_be(tmp_path, head):
    (tmp_path / "x.safetensors").write_bytes(head + b"{}")
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        read_header(tmp_path / "x.safetensors")


GOOD = save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_are_refused_or_harmless(data):
    """What is accepted is what the library accepts, and lies inside the file."""
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        length = 8 + int.from_bytes(GOOD[:8], "little")
        changed[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    raw = bytes(changed[: 8 + min(int.from_bytes(changed[:8], "little"), len(changed) - 8)])
    try:
        header = parse_header(raw, len(changed), "file")
    except ValueError:
        return
    assert all(len(raw) <= e.begin <= e.end <= len(changed) for e in header.entries)
    try:
        loaded = load(bytes(changed))
    except SafetensorError:
        return  # it is stricter still
    assert {e.name: (e.dtype.torch(), e.torch_shape) for e in header.entries} == {
        name: (t.dtype, tuple(t.shape)) for name, t in loaded.items()
    }


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F3"]) | values,
        "shape": st.lists(st.integers(-1, 2**70), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-8, 2**70), min_size=1, max_size=3) | values,
    },
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=8), entries | values, max_size=4), st.integers(0, 64))
def test_any_json_is_refused_or_harmless(header, size):
    text = json.dumps(header).encode()
    try:
        found = parse_header(packed(text), 8 + len(text) + size, "file")
    except ValueError:
        return
    assert sum(e.end - e.begin for e in found.entries) == size


@settings(max_examples=100, deadline=None)
@given(values | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=8), values)}))
def test_any_index_is_refused(tmp_path_factory, index):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        prune_checkpoint(folder, folder.with_name(folder.name + "-out"), 0.5)
    assert not folder.with_name(folder.name + "-out").exists()


@pytest.mark.parametrize("file", [
    "../in.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", ".", "a\\..\\b",
])  # fmt: skip
def test_paths_in_an_index_are_refused(tmp_path, file):
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "in.safetensors").write_bytes(GOOD)
    index = {"weight_map": {"a": file, "b": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        prune_checkpoint(folder, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()
