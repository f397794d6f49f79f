"""What a path is, told by its content: weights under any name, and what is none of them by its name."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import socket
import types
import zipfile

import dimap
import numpy as np
import pytest
import torch
from checkpoints import assert_same, load_folder, shards, vit
from dimap.bitmask import expand, load_file
from dimap.checkpoint import open_checkpoint
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file


def pruned(state=None, sparsity=0.5):
    state = vit() if state is None else state
    dimap.prune(state, sparsity)
    return state


# Files


@pytest.mark.parametrize("name", ["last.ckpt", "best.pth.tar", "model.PTH", "model", "m.weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_under_any_name(tmp_path, name, zipped):
    source, out = tmp_path / name, tmp_path / f"out-{name}"
    torch.save({"state_dict": vit()}, source, _use_new_zipfile_serialization=zipped)
    prune_checkpoint(source, out, 0.5)
    assert_same(torch.load(out, weights_only=True)["state_dict"], pruned())
    prune_checkpoint(source, tmp_path / "out.safetensors", 0.5)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), pruned())


@pytest.mark.parametrize("name", ["last.ckpt", "pytorch_model.bin", "MODEL.SAFETENSORS", "weights"])
def test_safetensors_under_any_name(tmp_path, name):
    save_file(vit(), tmp_path / name)
    prune_checkpoint(tmp_path / name, tmp_path / f"out-{name}", 0.5)
    assert_same(load_safetensors(tmp_path / f"out-{name}"), pruned())
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        prune_checkpoint(tmp_path / name, tmp_path / "out.pth", 0.5)


def traced(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.randn(1, 2)).save(path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


OTHERS = {
    "a Git LFS pointer": pointer,
    "a TorchScript archive": traced,
    "a GGUF file": lambda path: path.write_bytes(b"GGUF\3\0\0\0" + bytes(64)),
    "an ONNX file": lambda path: path.write_bytes(
        b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + bytes(9)
    ),
    "an HDF5 file": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)),
    "a NumPy array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "a NumPy archive": lambda path: np.savez(path.open("wb"), a=np.ones(3)),
    "a zip archive of another kind": zipped,
    "a pickle that torch.save did not write": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "a web page": lambda path: path.write_text("<!DOCTYPE html><title>404</title>"),
    "a gzip archive": lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(64)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".bin", ""])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_named(tmp_path, kind, ending):
    path = tmp_path / f"in{ending}"
    OTHERS[kind](path)
    for call in (open_checkpoint, load_file):
        with pytest.raises(ValueError, match=f"{path} must be a safetensors file or .* got {kind}"):
            call(path)


def test_pointers_in_a_folder_are_named(tmp_path):
    folder = shards(tmp_path / "in", vit())
    path = sorted(folder.glob("*.safetensors"))[1]
    pointer(path)
    with pytest.raises(ValueError, match=f"{path} must be .* got a Git LFS pointer"):
        open_checkpoint(folder)


def test_links_to_nowhere_are_named(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in (folder / "model.safetensors", tmp_path / "in.pth"):
        path.symlink_to("../blobs/0123")
        source = folder if path.parent == folder else path
        with pytest.raises(FileNotFoundError, match="link to nowhere") as error:
            open_checkpoint(source)
        assert error.value.filename == str(path)


def test_a_side_file_that_is_a_link_to_nowhere_is_named(tmp_path):
    folder = shards(tmp_path / "in", vit())
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").symlink_to("gone")
    with pytest.raises(OSError, match="got a link to nowhere") as error:
        prune_checkpoint(folder, tmp_path / "out", 0.5)
    assert error.value.filename == str(folder / "sub" / "vocab.txt")
    assert os.listdir(tmp_path) == ["in"]


def test_pipes_and_sockets_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.safetensors")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.pth")
    for name, kind in (("pipe.safetensors", "a pipe"), ("socket.pth", "a socket")):
        with pytest.raises(OSError, match=f"must be a file or folder, got {kind}"):
            open_checkpoint(name)
    os.mkdir("in")
    os.rename("pipe.safetensors", "in/model.safetensors")
    with pytest.raises(OSError, match="got a pipe"):
        open_checkpoint("in")


# What may lie beside weights in a file of torch.save


@pytest.mark.parametrize(
    "value",
    [argparse.Namespace(lr=0.1), types.SimpleNamespace(a=1), np.float64(0.5), np.arange(3)],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_of_known_classes_pass_through(tmp_path, value):
    torch.save({"model": vit(), "args": value}, tmp_path / "in.pth")
    prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", 0.5)
    got = torch.load(tmp_path / "out.pth", weights_only=False)
    assert type(got["args"]) is type(value)
    assert np.array_equal(got["args"], value)
    assert_same(got["model"], pruned())


def test_other_classes_are_refused_with_their_name(tmp_path):
    torch.save({"model": vit(), "run": os.getcwd}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"weights_only=True\), got posix\.getcwd"):
        open_checkpoint(tmp_path / "in.pth")


# Folders

NAMES = [
    "model.fp16.safetensors", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors",
    "adapter_model.safetensors", "own.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.fp16.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 2])
def test_folders_as_libraries_write_them(tmp_path, name, parts):
    folder, state = tmp_path / "in", vit()
    folder.mkdir()
    stem, ending = name.rsplit(".", 1)
    save = save_file if ending == "safetensors" else torch.save
    files = [f"{stem}-{i + 1:05d}-of-{parts:05d}.{ending}" for i in range(parts)]
    if parts == 1:
        save(state, folder / name)
    else:
        weight_map = {key: files[i % 2] for i, key in enumerate(state)}
        for file in files:
            save({k: v for k, v in state.items() if weight_map[k] == file}, folder / file)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"lr": 0.1}, folder / "training_args.bin")
    (folder / "config.json").write_text("{}")
    prune_checkpoint(folder, tmp_path / "out", 0.5, masks=tmp_path / "masks")
    out = tmp_path / "out"
    assert sorted(os.listdir(out)) == sorted(os.listdir(folder))
    got = load_folder(out)
    for file in out.glob("*model*.bin"):
        got |= torch.load(file, weights_only=True)
    assert_same(got, pruned())
    assert dimap.load_masks(tmp_path / "masks").keys() == dimap.select(vit(), 0.5).keys()
    prune_checkpoint(folder, out, 0.5, force=True)  # it is told for an earlier output


def test_a_folder_of_several_checkpoints_lists_them(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(vit(), tmp_path / name)
    with pytest.raises(ValueError, match=r"one set of weights, got a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)
    save_file(vit(), tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.others == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("indexed", [True, False])
def test_one_shard_alone_is_refused_everywhere(tmp_path, ending, indexed):
    name = f"part-1.{ending}" if indexed else f"model-00001-of-00002.{ending}"
    (save_file if ending == "safetensors" else torch.save)(vit(), tmp_path / name)
    if indexed:
        weight_map = {"a": name, "b": f"part-2.{ending}"}
        index = tmp_path / f"own.{ending}.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for call in (
        lambda: open_checkpoint(tmp_path / name),
        lambda: prune_checkpoint(tmp_path / name, tmp_path / f"out.{ending}", 0.5),
        lambda: expand(tmp_path / name, tmp_path / f"out.{ending}"),
    ):
        with pytest.raises(ValueError, match="must be a whole checkpoint, got one of its shards"):
            call()


def test_the_only_shard_is_whole_and_an_index_is_no_checkpoint(tmp_path):
    save_file(vit(), tmp_path / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(vit(), "model-00001-of-00001.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    prune_checkpoint(tmp_path / "model-00001-of-00001.safetensors", tmp_path / "o.safetensors", 0.5)
    with pytest.raises(ValueError, match="got their index: give the folder"):
        open_checkpoint(index)


def test_an_index_that_is_a_pointer_and_a_folder_of_folders(tmp_path):
    folder = shards(tmp_path / "unet", vit())
    shards(tmp_path / "vae", vit())
    with pytest.raises(FileNotFoundError, match="give one of its folders: unet, vae"):
        open_checkpoint(tmp_path)
    pointer(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="must be an index of weights, got a Git LFS pointer"):
        open_checkpoint(folder)


def test_caches_and_locks_are_left_out(tmp_path):
    folder = shards(tmp_path / "in", vit())
    for name in (".git/objects/ab", ".cache/blob", "sub/.git/x", "x.lock", "sub/y.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(vit(), folder / name)
    prune_checkpoint(folder, tmp_path / "out", 0.5)
    left = {p.relative_to(tmp_path / "out").parts for p in (tmp_path / "out").rglob("*")}
    assert ("sub", "y.txt") in left
    assert not {part for parts in left for part in parts} & {".git", ".cache", "x.lock"}


def test_a_folder_that_leads_back_to_itself_is_refused(tmp_path):
    folder = shards(tmp_path / "in", vit())
    (folder / "again").symlink_to(folder)
    with pytest.raises(OSError, match="got a link to a folder around it"):
        prune_checkpoint(folder, tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_a_repository_of_the_hub_comes_from_its_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    folder = shards(tmp_path / "cached", vit())
    card = "---\nlicense: mit\n---\n# A model\n\nWords.\n"
    (folder / "README.md").write_text(card)
    asked = []

    def cached(name, revision):
        asked.append((name, revision))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody is asked
    monkeypatch.setattr(hub, "snapshot_download", cached)
    done = prune_checkpoint("hf:org/name@v1", tmp_path / "out", 0.5)
    assert asked == [("org/name", "v1")]
    assert_same(load_folder(tmp_path / "out"), pruned())
    made = (tmp_path / "out" / "README.md").read_text()
    assert made.startswith(card + "\n## Pruned with dimap\n")
    (qkv,) = (module for module in done.report().modules if module.name == "qkv")
    assert f"| qkv | {qkv.weights:,} | {qkv.kept:,} | {qkv.nonzero:,} |" in made
    (folder / "README.md").write_text(made)
    prune_checkpoint("hf:org/name", tmp_path / "out", 0.25, force=True)
    assert (tmp_path / "out" / "README.md").read_text().count("## Pruned with dimap") == 1
    prune_checkpoint(folder, tmp_path / "local", 0.5)  # of a folder every other file is kept
    assert (tmp_path / "local" / "README.md").read_text() == made

    def away(name, revision):
        raise ConnectionError("the hub is away")

    monkeypatch.setattr(hub, "snapshot_download", away)
    with pytest.raises(OSError, match=r"hf:org/name is not in the hub's cache .* the hub is away"):
        open_checkpoint("hf:org/name")


# What the command takes, the call takes


def test_files_of_torch_save_with_patterns_masks_and_report(tmp_path):
    torch.save(vit(), tmp_path / "in.pth")
    patterns = {"qkv": r"blocks\.\d+\.attn\.qkv\.weight"}
    outputs = {"masks": tmp_path / "masks", "report": tmp_path / "report.json"}
    got = prune_checkpoint(
        tmp_path / "in.pth",
        tmp_path / "out.safetensors",
        0.5,
        patterns=patterns,
        format="bitmask",
        **outputs,
    )
    want = vit()
    pruning = dimap.prune(want, 0.5, patterns=patterns)
    assert_same(load_file(tmp_path / "out.safetensors"), want)
    assert (got.kept, got.nonzero, got.smallest) == (
        pruning.kept,
        pruning.nonzero,
        pruning.smallest,
    )
    masks = dimap.load_masks(tmp_path / "masks")
    assert all(torch.equal(masks[name], mask) for name, mask in pruning.masks.items())
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == pruning.report().kept


def test_methods_and_shares(tmp_path):
    save_file(vit(), tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    prune_checkpoint(tmp_path / "in.safetensors", out, 0.5, method="uniform", shares={"qkv": 0.25})
    want = vit()
    dimap.prune(want, {"qkv": 0.25, "proj": 0.5, "mlp": 0.5}, method="uniform")
    assert_same(load_file(out), want)
    with pytest.raises(ValueError, match="method must be one of dimap, lamp, uniform, global_mag"):
        prune_checkpoint(tmp_path / "in.safetensors", out, 0.5, method="taylor", force=True)
