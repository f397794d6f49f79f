"""Checkpoints in and out."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

from dimap import checkpoint as checkpoints
from dimap.stream import prune_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def tensors():
    generator = torch.Generator().manual_seed(0)
    state = {f"b.{i}.weight": torch.randn(5, 7, generator=generator) for i in (0, 2, 10)}
    state["half"] = torch.randn(3, 1, generator=generator).bfloat16()
    state["quarter"] = torch.randn(6, generator=generator).to(torch.float8_e4m3fn)
    state["index"] = torch.arange(4)
    state["flag"] = torch.tensor([True, False, True])
    state["scalar"] = torch.tensor(2.5, dtype=torch.float16)
    state["empty"] = torch.empty(0, 3)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].view_as(b[n]), b[n]) for n in a
    )


def copy(source, out, zeroed=False, *, weight="b.2.weight", **options):
    """Prune nothing of the one weight, or all of it."""
    patterns = {"one": re.escape(weight)}
    return prune_checkpoint(source, out, float(zeroed), patterns=patterns, **options)


@pytest.fixture
def single(tmp_path):
    path = tmp_path / "in.safetensors"
    save_file(tensors(), path, {"format": "pt", "note": "kept ✓"})
    return path


@pytest.fixture
def folder(tmp_path):
    """Two shards, their index, a subfolder, and a symbolic link as in the caches of hubs."""
    path = tmp_path / "in"
    (path / "sub").mkdir(parents=True)
    state = tensors()
    shards = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for i, name in enumerate(state):
        shards[f"model-{i % 2 + 1}.safetensors"][name] = state[name]
    for file, part in shards.items():
        save_file(part, path / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "sub" / "vocab.txt").write_text("words")
    (tmp_path / "blob").write_text('{"a": 1}')
    (path / "config.json").symlink_to(tmp_path / "blob")
    return path


def read(path):
    if path.is_dir():
        return {n: t for file in path.glob("*.safetensors") for n, t in load_file(file).items()}
    return load_file(path)


def names_in(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# What comes through


def test_unchanged_safetensors_comes_out_byte_by_byte(single, tmp_path):
    copy(single, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == single.read_bytes()


def test_only_the_changed_tensor_changes(single, tmp_path):
    before = single.read_bytes()
    copy(single, tmp_path / "out.safetensors", zeroed=True)
    want = tensors()
    want["b.2.weight"].zero_()
    assert same(load_file(tmp_path / "out.safetensors"), want)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept ✓"}
    assert single.read_bytes() == before
    assert names_in(tmp_path) == ["in.safetensors", "out.safetensors"]


def test_tensors_are_listed_with_shape_and_dtype(single):
    with checkpoints.open_checkpoint(single) as source:
        metas = {n: spec.meta() for n, spec in source.tensors.items()}
        listed = {n: (t.device.type, t.shape, t.dtype) for n, t in metas.items()}
        assert source.metadata["note"] == "kept ✓"
    assert listed == {n: ("meta", t.shape, t.dtype) for n, t in tensors().items()}


def test_folder_keeps_shards_index_and_other_files(folder, tmp_path):
    out = tmp_path / "out"
    copy(folder, out, zeroed=True)
    want = tensors()
    want["b.2.weight"].zero_()
    assert same(read(out), want)
    assert names_in(out) == names_in(folder)
    assert not (out / "config.json").is_symlink()
    for name in ("config.json", "sub/vocab.txt", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert same(read(folder), tensors())
    assert sorted(os.listdir(tmp_path)) == ["blob", "in", "out"]


def test_folder_of_one_file(tmp_path):
    (tmp_path / "in").mkdir()
    save_file(tensors(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"x")
    copy(tmp_path / "in", tmp_path / "out")
    assert same(read(tmp_path / "out"), tensors())
    with checkpoints.open_checkpoint(tmp_path / "in") as source:
        assert source.notes == ["pytorch_model.bin is kept as it is: its weights are not pruned"]


def test_safetensors_file_that_the_index_does_not_name_is_kept(folder, tmp_path):
    save_file({"x": torch.ones(1)}, folder / "other.safetensors")
    copy(folder, tmp_path / "out")
    kept = (tmp_path / "out" / "other.safetensors").read_bytes()
    assert kept == (folder / "other.safetensors").read_bytes()
    with checkpoints.open_checkpoint(folder) as source:
        assert source.notes == ["other.safetensors is kept as it is: its weights are not pruned"]


@pytest.mark.parametrize(
    ("ending", "nest"),
    [
        (".pth", ("model",)),
        (".pt", ("state_dict",)),
        (".bin", ()),
        (".pth", ("model", "state_dict")),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_keeps_everything_around_the_weights(tmp_path, ending, nest, zipped):
    root = state = OrderedDict(tensors())
    if not zipped:
        del state["quarter"]  # a dtype that the old format does not know
    state["b.2.weight"] = nn.Parameter(state["b.2.weight"])
    for key in reversed(nest):
        root = {key: root, "epoch": 3, "optimizer": {"lr": 0.1, "steps": [torch.ones(2)]}}
    torch.save(root, tmp_path / f"in{ending}", _use_new_zipfile_serialization=zipped)
    before = (tmp_path / f"in{ending}").read_bytes()
    copy(tmp_path / f"in{ending}", tmp_path / f"out{ending}", zeroed=True)
    assert (tmp_path / f"in{ending}").read_bytes() == before
    got = torch.load(tmp_path / f"out{ending}", weights_only=True)
    for key in nest:
        assert got["epoch"] == 3
        assert got["optimizer"]["steps"][0].tolist() == [1, 1]
        got = got[key]
    want = tensors()
    want["b.2.weight"].zero_()
    assert same(got, {name: want[name] for name in state})
    assert isinstance(got["b.2.weight"], nn.Parameter)


def test_pickled_with_other_values_among_the_weights(tmp_path):
    torch.save({"w": torch.ones(2, 2), "step": 7}, tmp_path / "in.pth")
    copy(tmp_path / "in.pth", tmp_path / "out.pth", weight="w")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["step"] == 7


def test_pickled_to_safetensors_with_tied_and_transposed_weights(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    root = {"model": {"a": weight, "b": weight, "c": weight.t(), "d": weight[1:]}}
    torch.save(root, tmp_path / "in.pth")
    patterns = {"one": "[ab]"}
    prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", 0.0, patterns=patterns)
    assert same(load_file(tmp_path / "out.safetensors"), root["model"])


def test_force_replaces_a_file(single, tmp_path):
    (tmp_path / "out.safetensors").write_text("old")
    copy(single, tmp_path / "out.safetensors", force=True)
    assert same(load_file(tmp_path / "out.safetensors"), tensors())


def test_force_replaces_a_link_and_not_what_it_points_to(single, tmp_path):
    (tmp_path / "precious").write_text("old")
    (tmp_path / "out.safetensors").symlink_to(tmp_path / "precious")
    copy(single, tmp_path / "out.safetensors", force=True)
    assert (tmp_path / "precious").read_text() == "old"
    assert not (tmp_path / "out.safetensors").is_symlink()


def test_force_replaces_a_folder_that_holds_a_checkpoint(folder, tmp_path):
    copy(folder, tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("old")
    copy(folder, tmp_path / "out", force=True)
    assert names_in(tmp_path / "out") == names_in(folder)
    assert sorted(os.listdir(tmp_path)) == ["blob", "in", "out"]


# What is refused when reading


def refused(path, error, match):
    with pytest.raises(error, match=match):
        checkpoints.open_checkpoint(path)


@pytest.mark.parametrize("cut", [1, 40])
def test_truncated_safetensors(single, cut):
    single.write_bytes(single.read_bytes()[:-cut])
    refused(single, ValueError, r"in\.safetensors must be a complete safetensors file")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"a text that is no checkpoint\n", b"\xff" * 64]
)
def test_not_safetensors(single, content):
    single.write_bytes(content)
    refused(single, ValueError, r"in\.safetensors must be a complete safetensors file")


def test_safetensors_without_tensors(tmp_path):
    save_file({}, tmp_path / "in.safetensors")
    refused(tmp_path / "in.safetensors", ValueError, "must hold at least one tensor, got none")


def test_missing_file(tmp_path):
    refused(tmp_path / "in.safetensors", FileNotFoundError, r"in\.safetensors")


def test_unknown_content(tmp_path):
    (tmp_path / "in.txt").write_text("x")
    refused(
        tmp_path / "in.txt", ValueError, r"in\.txt must be a safetensors file or .* another kind"
    )


def test_random_init_of_a_file(single):
    with pytest.raises(ValueError, match=r"random weights .* are only for timm:NAME"):
        checkpoints.open_checkpoint(single, random_init=True)


def test_folder_without_weights_lists_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, FileNotFoundError, r"must hold model\.safetensors or .*, got notes\.txt")


def test_missing_shard(folder):
    (folder / "model-2.safetensors").unlink()
    refused(folder, FileNotFoundError, r"model\.safetensors\.index\.json names it.*model-2")


def test_truncated_shard(folder):
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, ValueError, r"model-2\.safetensors must be a complete safetensors file")


def edit(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_naming_an_absent_tensor(folder):
    edit(folder, lambda m: m.update(ghost="model-1.safetensors"))
    refused(folder, ValueError, r"index\.json must match its shards, got ghost, not in model-1")


def test_index_naming_the_wrong_shard(folder):
    edit(folder, lambda m: m.update({"b.0.weight": "model-2.safetensors"}))
    refused(folder, ValueError, r"got b\.0\.weight, not in model-2\.safetensors")


def test_index_leaving_a_tensor_out(folder):
    edit(folder, lambda m: m.pop("b.0.weight"))
    refused(folder, ValueError, r"must name every tensor of its shards, got no b\.0\.weight")


@pytest.mark.parametrize(
    "name", ["../blob.safetensors", "/etc/x.safetensors", "sub/x.safetensors", ".."]
)
def test_index_leading_out_of_the_folder(folder, name):
    edit(folder, lambda m: m.update(w=name))
    refused(folder, ValueError, "must name safetensors files beside it, got")


def test_index_naming_a_number(folder):
    edit(folder, lambda m: m.update(w=3))
    refused(folder, ValueError, "must name safetensors files beside it, got 3")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', "\xff", "[" * 100_000])
def test_broken_index(folder, text):
    (folder / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    refused(folder, ValueError, r"index\.json must (be JSON|have a weight_map)")


def test_tensor_in_two_shards(folder):
    save_file(load_file(folder / "model-1.safetensors"), folder / "model-2.safetensors")
    refused(
        folder, ValueError, r"a tensor must be in one shard, got .* in model-1.* and in model-2"
    )


@pytest.mark.parametrize(
    ("root", "match"),
    [
        (
            {"weights": {"w": 1.0}, "epoch": 3},
            "under 'model', .* got 'weights', 'epoch'",
        ),
        ({}, "got an empty dict"),
        ({"model": {}}, r"in\.pth must hold weights, .* got 'model'"),
        ([torch.ones(1)], "must hold a state dict, got a list"),
        (torch.ones(1), "must hold a state dict, got a Tensor"),
        ({1: torch.ones(1)}, "must have strings for names, got 1"),
        (
            {"model": {"w": torch.ones(2, 2)}, "state_dict": {"w": torch.ones(2, 2)}},
            "one set of weights, got 'model', 'state_dict': --key NAME says which",
        ),
    ],
)
def test_pickled_without_a_state_dict(tmp_path, root, match):
    torch.save(root, tmp_path / "in.pth")
    refused(tmp_path / "in.pth", ValueError, match)


def test_pickled_code_is_not_run_and_is_named(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "args": Path("x")}, tmp_path / "in.pth")
    refused(tmp_path / "in.pth", ValueError, r"must hold weights and plain values only .*pathlib")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pickled(tmp_path, zipped):
    file = tmp_path / "in.pth"
    torch.save({"w": torch.ones(1000)}, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:-100])
    refused(file, ValueError, r"in\.pth must be a complete file of torch\.save")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_not_pickled(tmp_path, content):
    (tmp_path / "in.pth").write_bytes(content)
    refused(tmp_path / "in.pth", ValueError, r"in\.pth must be a complete file of torch\.save")


# What is refused when writing


def not_written(source, out, error, match, **options):
    around = out.parent
    before = names_in(around) if around.is_dir() else None
    with pytest.raises(error, match=match):
        copy(source, out, **options)
    assert (names_in(around) if around.is_dir() else None) == before


def test_existing_file_is_not_overwritten(single, tmp_path):
    (tmp_path / "out.safetensors").write_text("old")
    not_written(single, tmp_path / "out.safetensors", FileExistsError, r"out\.safetensors")
    assert (tmp_path / "out.safetensors").read_text() == "old"


def test_existing_folder_is_not_overwritten(folder, tmp_path):
    (tmp_path / "out").mkdir()
    not_written(folder, tmp_path / "out", FileExistsError, "exists already")


def test_folder_of_other_things_is_not_replaced_by_force(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    not_written(folder, tmp_path / "out", FileExistsError, "is a folder without", force=True)


@pytest.mark.parametrize("force", [True, False])
def test_output_is_the_input(single, folder, tmp_path, force):
    not_written(single, single, ValueError, "must not be the checkpoint that is read", force=force)
    not_written(folder, folder, ValueError, "must not be the checkpoint that is read", force=force)
    (tmp_path / "link.safetensors").symlink_to(single)
    not_written(single, tmp_path / "link.safetensors", ValueError, "must not be", force=force)
    (tmp_path / "hard.safetensors").hardlink_to(single)
    not_written(single, tmp_path / "hard.safetensors", ValueError, "must not be", force=force)


def test_output_inside_the_input(folder):
    not_written(folder, folder / "sub" / "out", ValueError, "must lie apart from")


def test_output_around_the_input(folder, tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    not_written(folder, tmp_path, ValueError, "must lie apart from", force=True)


def test_output_of_another_form(single, folder, tmp_path):
    not_written(single, tmp_path / "out.pth", ValueError, r"must end in \.safetensors, got")
    not_written(single, tmp_path / "out", ValueError, r"must end in \.safetensors, got")
    (tmp_path / "dir").mkdir()
    not_written(single, tmp_path / "dir", IsADirectoryError, "must be a file, got a folder")
    (tmp_path / "file").write_text("x")
    not_written(folder, tmp_path / "file", NotADirectoryError, "must be a folder, got a file")


def test_output_in_a_missing_folder(single, tmp_path):
    not_written(
        single, tmp_path / "no" / "out.safetensors", FileNotFoundError, "no/out.safetensors"
    )


def test_output_in_an_unwritable_folder(single):
    # Not in tmp_path, which other users cannot enter.
    with tempfile.TemporaryDirectory() as name:
        inner = Path(name) / "inner"
        inner.mkdir()
        with checkpoints.open_checkpoint(single) as source:
            inner.chmod(0o555)
            Path(name).chmod(0o755)
            root = os.geteuid() == 0
            if root:  # to whom no folder is unwritable
                os.seteuid(65534)
            try:
                with (
                    pytest.raises(PermissionError, match="folder that can be written to"),
                    source.creating(inner / "out.safetensors"),
                ):
                    pass
            finally:
                if root:
                    os.seteuid(0)
                inner.chmod(0o755)
        assert os.listdir(inner) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("existing", [True, False])
def test_interrupted_in_the_middle(single, folder, tmp_path, error, existing):
    for source, out in ((single, tmp_path / "out.safetensors"), (folder, tmp_path / "out")):
        if existing:
            copy(source, out)
        before = read(out) if existing else None
        listing = names_in(tmp_path)

        class Fails:
            def step(self, description, total=None):
                if description == "writing":
                    raise error

            def advance(self, amount):
                pass

        with pytest.raises(type(error) if isinstance(error, OSError) else error):
            copy(source, out, zeroed=True, force=True, progress=Fails())
        assert names_in(tmp_path) == listing
        if existing:
            assert same(read(out), before)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("in.safetensors", "out.safetensors"),
        ("in", "out"),
        ("in.pth", "out.pth"),
        ("in.pth", "out.safetensors"),
    ],
)
def test_a_write_that_fails_names_the_output_and_leaves_nothing(tmp_path, source, out):
    resource = pytest.importorskip("resource")
    state = {"a": torch.ones(100, 1000), "b": torch.ones(100, 1000)}
    if source == "in.pth":
        torch.save(state, tmp_path / source)
    else:
        name = "in/model.safetensors" if source == "in" else source
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(state, tmp_path / name)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # as on a disk that fills up
    try:
        not_written(
            tmp_path / source,
            tmp_path / out,
            OSError,
            rf"File too large.*{out}(/model.safetensors)?'",
            weight="a",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# timm


def test_timm_random_init_is_the_same_each_time_and_leaves_the_seed_alone(tmp_path):
    pytest.importorskip("timm")
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    states = []
    for _ in range(2):
        with checkpoints.open_checkpoint("timm:vit_tiny_patch16_224", random_init=True) as source:
            states.append({name: source.get(name) for name in source.tensors})
            assert source.metadata["architecture"] == "vit_tiny_patch16_224"
    assert same(*states)
    assert torch.equal(torch.rand(1), want)


def test_timm_is_written_as_safetensors_or_pickled(tmp_path):
    pytest.importorskip("timm")
    for out in (tmp_path / "out.safetensors", tmp_path / "out.pth"):
        prune_checkpoint("timm:vit_tiny_patch16_224", out, 0.5, random_init=True)
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.pth"):
        prune_checkpoint("timm:vit_tiny_patch16_224", tmp_path / "out", 0.5, random_init=True)
    state = load_file(tmp_path / "out.safetensors")
    assert same(torch.load(tmp_path / "out.pth", weights_only=True), state)


def test_unknown_timm_model():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm must know the model, got 'swin_tinny'; near it are"):
        checkpoints.open_checkpoint("timm:swin_tinny", random_init=True)


def test_timm_without_a_hub(monkeypatch):
    timm = pytest.importorskip("timm")

    constants = pytest.importorskip("huggingface_hub.constants")

    def no_session():
        raise ConnectionError("no route")

    def unreachable(*_, pretrained=False, **__):
        assert pretrained
        assert constants.HF_HUB_OFFLINE  # its client must not try again and again
        raise RuntimeError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", no_session)

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        OSError, match=r"timm:vit_tiny.* could not be loaded: .* does not answer \(no route\)"
    ):
        checkpoints.open_checkpoint("timm:vit_tiny_patch16_224")
    assert not constants.HF_HUB_OFFLINE
