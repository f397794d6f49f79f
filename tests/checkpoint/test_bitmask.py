"""Bitmask files: smaller, and the dense ones come back bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod

import dimap
import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import runner
from dimap.checkpoint import streaming
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from checkpoints import BITS, CASES, DTYPES, FORMATS, assert_same, shards, vit
from dimap.bitmask import expand
from dimap.stream import prune_checkpoint
from ranks import Group
from safetensors import safe_open
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["1", "3"], ids=["one thread", "three threads"])
def threads(request, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", request.param)


# The operators

PATTERNS = {2: [0, 0x8000, 1, 0x7FFF, 0xFC00, 0x3C01], 4: [0, 1 << 31, 1, 0x7FC00001, 0xFF800000]}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(DTYPES)), st.integers(0, 300), st.randoms(use_true_random=False))
def test_pack_keeps_every_bit(name, count, random):
    """Negative zeros, NaNs with their payload, infinities and denormals among the zeros."""
    dtype = DTYPES[name]
    words = [random.choice(PATTERNS[dtype.itemsize]) for _ in range(count)]
    raw = np.array(words, np.uint32 if dtype.itemsize == 4 else np.uint16)
    weights = torch.from_numpy(raw.view(f"i{dtype.itemsize}")).view(dtype)
    bits, values = dimap.ops.pack(weights)
    assert bits.tolist() == np.packbits(raw != 0, bitorder="little").tolist()
    assert (
        values.view(BITS[dtype.itemsize]).tolist()
        == raw[raw != 0].view(f"i{dtype.itemsize}").tolist()
    )
    back = dimap.ops.unpack(bits, values, [count])
    assert torch.equal(back.view(BITS[dtype.itemsize]), weights.view(BITS[dtype.itemsize]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.45, 0.999, 1.0])
@pytest.mark.parametrize(
    "shape", [(), (0, 5), (65536,), (65537,), (3, 65533), (131073, 2)], ids=str
)
def test_pack_at_the_edges_of_what_a_thread_does(dtype, density, shape):
    generator = torch.Generator().manual_seed(prod(shape))
    weights = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    weights[torch.rand(shape, generator=generator) >= density] = 0
    results = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            bits, values = dimap.ops.pack(weights)
            results.append((bits, values, dimap.ops.unpack(bits, values, shape)))
        finally:
            torch.set_num_threads(before)
    for bits, values, back in results:
        assert torch.equal(bits, results[0][0])
        assert torch.equal(values, weights[weights != 0])
        assert torch.equal(back, weights)


def test_pack_takes_weights_in_their_logical_order():
    weights = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    bits, values = dimap.ops.pack(weights.T)
    assert bits.tolist() == [0b011001]
    assert values.tolist() == [1.0, 3.0, 2.0]


U8 = torch.uint8
WRONG = {
    "bits too long": (
        [5, 0],
        [1.0, 2.0],
        [3],
        "bits must be uint8 of one dimension, 1 for 3 weights",
    ),
    "bits too short": ([5], [1.0, 2.0], [9], "bits must be uint8 of one dimension, 2 for 9"),
    "too few values": ([5], [1.0], [3], "values must have one dimension and 2 weights"),
    "too many values": ([5], [1.0] * 3, [3], "values must have one dimension and 2 weights"),
    "unused bits": ([0b1101], [1.0] * 3, [3], "zeros in the unused bits"),
    "a negative size": ([], [], [-1], "must not be negative"),
    "an absurd size": ([], [], [1 << 40, 1 << 40], "more than 2\\^63"),
}


@pytest.mark.parametrize("case", WRONG)
def test_unpack_refuses(case):
    bits, values, sizes, message = WRONG[case]
    with pytest.raises(RuntimeError, match=message):
        dimap.ops.unpack(torch.tensor(bits, dtype=U8), torch.tensor(values), sizes)


def test_pack_refuses_other_dtypes():
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16, got float64"):
        dimap.ops.pack(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="values must be float32"):
        dimap.ops.unpack(torch.zeros(1, dtype=U8), torch.zeros(0, dtype=torch.int32), [3])


# Files that are pruned as they stream by


@pytest.fixture(params=FORMATS[1:])
def form(request):
    return request.param


def both(source, folder, sparsity, form, **options):
    """Pruned dense and in the form, and the latter expanded: the paths."""
    dense, packed, back = (folder / (name + source.suffix) for name in ("dense", "packed", "back"))
    a = prune_checkpoint(source, dense, sparsity, **options)
    b = prune_checkpoint(source, packed, sparsity, format=form, **options)
    assert a == b or repr(a) == repr(b)  # NaN thresholds differ from themselves
    expand(packed, back)
    return dense, packed, back


@pytest.mark.parametrize(("sparsity", "options"), CASES)
@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_comes_back_bit_by_bit(tmp_path, threads, form, dtype, step, sparsity, options):
    save_file(
        vit(DTYPES[dtype], step=step), tmp_path / "in.safetensors", {"format": "pt", "ü": "✓"}
    )
    dense, packed, back = both(tmp_path / "in.safetensors", tmp_path, sparsity, form, **options)
    assert back.read_bytes() == dense.read_bytes()
    assert_same(dimap.load_file(packed), load_file(dense))
    with safe_open(packed, "pt") as file:  # any reader of safetensors can open it
        assert file.metadata()["ü"] == "✓"
        assert file.metadata()["dimap_bitmask"] == str(FORMATS.index(form))


@pytest.mark.parametrize("aside", [0, 2000], ids=["no notes", "some notes"])
def test_places_are_counted_where_the_survey_did_not_note_them(
    tmp_path, threads, monkeypatch, form, aside
):
    monkeypatch.setattr(streaming, "ASIDE", aside)
    save_file(vit(step=0.01), tmp_path / "in.safetensors")
    dense, _, back = both(tmp_path / "in.safetensors", tmp_path, 0.55, form)
    assert back.read_bytes() == dense.read_bytes()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95])
def test_zeros_and_negative_zeros_that_are_kept(tmp_path, threads, form, sparsity):
    """Three quarters are zero already, half of these negative: masks keep some of them."""
    state = vit()
    for i, weights in enumerate(state.values()):
        generator = torch.Generator().manual_seed(i)
        draw = torch.rand(weights.shape, generator=generator)
        weights[draw < 0.75] = 0.0
        weights[draw < 0.375] = -0.0
    save_file(state, tmp_path / "in.safetensors")
    dense, packed, back = both(tmp_path / "in.safetensors", tmp_path, sparsity, form)
    assert back.read_bytes() == dense.read_bytes()
    assert packed.stat().st_size < dense.stat().st_size


def test_a_folder_keeps_shards_and_other_files_and_its_index_names_the_bits(
    tmp_path, threads, form
):
    source = shards(tmp_path / "in", vit(torch.bfloat16, step=0.01))
    dense, packed, back = both(source, tmp_path, 0.55, form)
    assert sorted(p.name for p in back.iterdir()) == sorted(p.name for p in source.iterdir())
    for file in dense.iterdir():
        assert (back / file.name).read_bytes() == file.read_bytes(), file.name
    assert (back / INDEX).read_bytes() == (source / INDEX).read_bytes()
    index = json.loads((packed / INDEX).read_text())
    held, size = {}, 0
    for file in packed.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
            size += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size
    assert_same(dimap.load_file(packed), dimap.load_file(dense))


def test_a_folder_of_one_file_has_no_index(tmp_path, form):
    (tmp_path / "in").mkdir()
    save_file(vit(), tmp_path / "in" / "model.safetensors")
    dense, packed, back = both(tmp_path / "in", tmp_path, 0.55, form)
    assert [p.name for p in packed.iterdir()] == ["model.safetensors"]
    assert (back / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()


def test_a_folder_may_mix_dense_and_bitmask_files(tmp_path, form):
    source = shards(tmp_path / "in", vit())
    dense, packed, back = both(source, tmp_path, 0.55, form)
    (name, *_) = sorted(p.name for p in dense.glob("*.safetensors"))
    (packed / name).write_bytes((dense / name).read_bytes())
    index = json.loads((packed / INDEX).read_text())
    dropped = [n for n, f in index["weight_map"].items() if f == name and n.endswith(".bitmask")]
    for entry in dropped:
        del index["weight_map"][entry]
    (packed / INDEX).write_text(json.dumps(index))
    assert_same(dimap.load_file(packed), dimap.load_file(dense))
    expand(packed, back, force=True)
    assert all((back / f.name).read_bytes() == f.read_bytes() for f in dense.iterdir())


def test_a_name_that_ends_like_that_of_bits(tmp_path, form):
    state = vit()
    state["blocks.0.attn.qkv.weight.bitmask"] = torch.arange(7)
    state["blocks.1.mlp.fc1.weight.bitmask"] = torch.zeros(3, dtype=U8)
    state["blocks.1.mlp.fc1.weight.bitmask.bitmask"] = torch.zeros(5)
    save_file(state, tmp_path / "in.safetensors")
    dense, packed, back = both(tmp_path / "in.safetensors", tmp_path, 0.55, form)
    assert back.read_bytes() == dense.read_bytes()
    if form == "bitmask":
        with safe_open(packed, "pt") as file:
            shape = file.get_slice("blocks.0.attn.qkv.weight").get_shape()
        assert shape == [96, 32]  # stored as it is


def test_only_pruned_tensors_are_packed_and_only_where_that_is_smaller(tmp_path):
    state = vit()
    state["head.weight"].zero_()
    save_file(state, tmp_path / "in.safetensors")
    ratios = {"qkv": 0.55, "proj": 0.0, "mlp": 1.0}
    prune_checkpoint(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", ratios, format="bitmask"
    )
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        names = list(file.keys())
        assert file.get_tensor("blocks.0.mlp.fc1.weight").shape == (0,)
    packed = {name.removesuffix(".bitmask") for name in names if name.endswith(".bitmask")}
    assert packed == {
        f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "mlp.fc1", "mlp.fc2")
    }


def prune_in_group(jobs):
    """What every rank runs."""
    for source, out in jobs:
        prune_checkpoint(source, out, 0.55, format="bitmask", group=dist.group.WORLD)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_several_processes_write_the_same(tmp_path):
    state = vit(step=0.01)
    save_file(state, tmp_path / "in.safetensors")
    sources = [tmp_path / "in.safetensors", shards(tmp_path / "in", state)]
    jobs = [(source, tmp_path / f"out{source.suffix}") for source in sources]
    group = Group(2)
    try:
        group(prune_in_group, jobs)
    finally:
        group.close()
    for source, out in jobs:
        one = tmp_path / f"one{source.suffix}"
        prune_checkpoint(source, one, 0.55, format="bitmask")
        if source.is_dir():
            names = sorted(p.name for p in one.iterdir())
            assert sorted(p.name for p in out.iterdir()) == names
            assert all((out / n).read_bytes() == (one / n).read_bytes() for n in names)
        else:
            assert out.read_bytes() == one.read_bytes()


# Sizes


def test_swin_b_takes_at_most_51_percent(tmp_path):
    """The true one's shapes, float32 at 55 %: by the layout alone, which gives the exact size."""
    timm = pytest.importorskip("timm")
    from dimap.checkpoint import bitmask, header

    with torch.device("meta"):
        model = timm.create_model("swin_base_patch4_window7_224")
    state = {name: t for name, t in model.state_dict().items()}
    described = [(name, header.dtype_of(t.dtype), list(t.shape)) for name, t in state.items()]
    dense = header.make_header(described, {"format": "pt"}, "dense")
    pruned = [
        p
        for m, xs in dimap.find_modules(model).items()
        if m != "aux"
        for x in xs
        for p in x.parameters
    ]
    nonzero = {name: state[name].numel() - round(0.55 * state[name].numel()) for name in pruned}
    packed = bitmask.lay_out(dense, nonzero, "dense")
    assert dense.file_size > 340_000_000
    assert packed.header.file_size <= 0.51 * dense.file_size


MEMORY = """
import sys, dimap.stream, dimap.bitmask
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
open("/proc/self/clear_refs", "w").write("5")
before = peak()
dimap.stream.prune_checkpoint(sys.argv[1], sys.argv[2], 0.55, patterns={"all": "w"}, format=sys.argv[4])
pruned = peak() - before
open("/proc/self/clear_refs", "w").write("5")
before = peak()
dimap.bitmask.expand(sys.argv[2], sys.argv[3])
print(pruned // 1024, (peak() - before) // 1024)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor(tmp_path, form):
    """One tensor of 320 MB, more than what is allowed here."""
    part = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    shape = [76, 1 << 20]
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(part) * 76]}}
    text = json.dumps(header).encode()
    files = [tmp_path / f"{name}.safetensors" for name in ("in", "packed", "back")]
    with open(files[0], "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(76):
            file.write(part)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, files), form], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    pruned, expanded = map(int, run.stdout.split())
    assert pruned < 250
    assert expanded < 150
    assert files[1].stat().st_size < 0.49 * files[0].stat().st_size
    assert files[2].stat().st_size == files[0].stat().st_size


# Tensors in memory


def assorted():
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(40, 30, generator=generator) * (
        torch.rand(40, 30, generator=generator) < 0.4
    )
    state = {f"sparse.{name}": sparse.to(dtype) for name, dtype in DTYPES.items()}
    state |= {"dense": torch.randn(9, 9), "scalar": torch.tensor(0.0), "empty": torch.zeros(0, 4)}
    state |= {"zeros": torch.zeros(1000), "transposed": sparse.T, "tied": state["sparse.float32"]}
    state |= {
        "int": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "double": torch.zeros(9).double(),
    }
    state |= {
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "byte": torch.zeros(100, dtype=U8),
    }
    return state | {"float8": torch.zeros(64).to(torch.float8_e4m3fn), "one": torch.zeros(1)}


def test_save_and_load_any_state_dict(tmp_path, form):
    state = assorted()
    dimap.save_file(state, tmp_path / "f.safetensors", {"who": "me"}, format=form)
    found = dimap.load_file(tmp_path / "f.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bytes(found[name].reshape(-1).view(U8)) == bytes(
            tensor.resolve_conj().reshape(-1).view(U8)
        ), name
    expand(tmp_path / "f.safetensors", tmp_path / "dense.safetensors")
    assert_same(load_file(tmp_path / "dense.safetensors"), found)
    with safe_open(tmp_path / "dense.safetensors", "pt") as file:
        assert file.metadata() == {"who": "me"}


def test_load_file_reads_dense_files_and_folders(tmp_path):
    state = vit()
    save_file(state, tmp_path / "f.safetensors")
    assert_same(dimap.load_file(tmp_path / "f.safetensors"), state)
    assert_same(dimap.load_file(shards(tmp_path / "in", state)), state)


BAD = {
    "nothing": ({}, None, ValueError, "at least one tensor"),
    "no tensor": ({"a": 3}, None, TypeError, "names to tensors, got 'a': int"),
    "metadata": ({"a": torch.ones(1)}, {"a": 1}, TypeError, "strings to strings"),
    "own metadata": (
        {"a": torch.ones(1)},
        {"dimap_bitmask": "1"},
        ValueError,
        "metadata of a bitmask",
    ),
    "meta": ({"a": torch.ones(1, device="meta")}, None, ValueError, "a must be .* got a meta one"),
    "sparse": ({"a": torch.ones(1).to_sparse()}, None, ValueError, "got a sparse_coo one"),
    "dtype": (
        {"a": torch.ones(1, dtype=torch.complex128)},
        None,
        ValueError,
        "got torch.complex128",
    ),
    "reserved": ({"__metadata__": torch.ones(1)}, None, ValueError, "must not be called"),
}


@pytest.mark.parametrize("case", BAD)
def test_save_file_refuses(tmp_path, form, case):
    tensors, metadata, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        dimap.save_file(tensors, tmp_path / "f.safetensors", metadata, format=form)
    assert list(tmp_path.iterdir()) == []


# The command line


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_file(vit(), "in.safetensors", {"format": "pt"})

    return runner(capsys)


def test_prune_and_expand_on_the_command_line(run, tmp_path, form):
    prune = ("prune", "in.safetensors", "-s", 0.55)
    assert run(*prune[:2], "dense.safetensors", *prune[2:])[0] == 0
    assert run(*prune[:2], "packed.safetensors", *prune[2:], "--format", form)[0] == 0
    code, out, _ = run("expand", "packed.safetensors", "back.safetensors")
    assert code == 0
    assert "wrote back.safetensors" in out
    dense = (tmp_path / "dense.safetensors").read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes() == dense
    code, _, err = run("expand", "packed.safetensors", "back.safetensors")
    assert code == 1
    assert "exists already" in err
    code, out, _ = run("expand", "packed.safetensors", "back.safetensors", "--force", "--json")
    told = json.loads(out)
    assert (told["bytes_in"], told["bytes_out"]) == (
        (tmp_path / "packed.safetensors").stat().st_size,
        len(dense),
    )
    code, out, _ = run("inspect", "packed.safetensors", "--json")
    assert json.loads(out)["modules"][0]["sparsity"] == pytest.approx(0.55, abs=1e-3)
    assert "dimap expand" in json.loads(out)["notes"][0]


def test_a_bitmask_file_is_not_pruned_and_a_dense_one_not_expanded(run, tmp_path, form):
    run("prune", "in.safetensors", "p.safetensors", "-s", 0.55, "--format", form)
    code, _, err = run("prune", "p.safetensors", "out.safetensors", "-s", 0.6)
    assert code == 1
    assert "must be dense" in err
    code, _, err = run("expand", "in.safetensors", "out.safetensors")
    assert code == 1
    assert "must be a bitmask file, got one that is dense already" in err
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_of_a_pth_file(run, tmp_path, form):
    state = vit(torch.float16)
    torch.save({"model": state, "step": 3}, "in.pth")
    code, _, err = run("prune", "in.pth", "out.pth", "-s", 0.55, "--format", form)
    assert code == 1
    assert "must end in .safetensors" in err
    assert run("prune", "in.pth", "out.safetensors", "-s", 0.55, "--format", form)[0] == 0
    dimap.prune(state, 0.55)
    assert_same(dimap.load_file("out.safetensors"), state)
    if form == "compact":
        return
    with safe_open("out.safetensors", "pt") as file:
        packed = {n.removesuffix(".bitmask") for n in file.keys() if n.endswith(".bitmask")}  # noqa: SIM118
    assert packed == {n for n in state if "weight" in n and ("attn" in n or "mlp" in n)}


def test_many_checkpoints(run, tmp_path, form):
    save_file(vit(seed=1), "other.safetensors")
    code, _, err = run(
        "prune",
        "in.safetensors",
        "other.safetensors",
        "--out-dir",
        "out",
        "-s",
        0.55,
        "--format",
        form,
    )
    assert code == 0, err
    for name, seed in (("in", 0), ("other", 1)):
        state = vit(seed=seed)
        dimap.prune(state, 0.55)
        assert_same(dimap.load_file(tmp_path / "out" / f"{name}.safetensors"), state)
