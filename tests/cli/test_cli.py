"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import runner

pytest.importorskip("safetensors")
pytest.importorskip("typer")

import dimap
from dimap.cli import app
from dimap.cli.progress import Bar
from dimap.flops import count_flops
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def swin(dtype=torch.float32):
    """A Swin of two blocks under timm's names."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,)}
    for block in range(2):
        name = f"layers.0.blocks.{block}"
        shapes |= {
            f"{name}.norm1.weight": (8,),
            f"{name}.attn.relative_position_bias_table": (9, 2),
            f"{name}.attn.qkv.weight": (24, 8),
            f"{name}.attn.qkv.bias": (24,),
            f"{name}.attn.proj.weight": (8, 8),
            f"{name}.mlp.fc1.weight": (32, 8),
            f"{name}.mlp.fc2.weight": (8, 32),
        }
    shapes["head.fc.weight"] = (10, 8)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.arange(16).reshape(4, 4)
    return state


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command in a folder with in.safetensors: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_file(swin(), "in.safetensors", {"format": "pt", "note": "kept"})

    return runner(capsys)


def fails(run, *arguments, code=1):
    """The one line on stderr; what is in the folder stays as it was."""
    before = {name: os.stat(name).st_mtime_ns for name in os.listdir()}
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert "Traceback" not in err
    assert {name: os.stat(name).st_mtime_ns for name in os.listdir()} == before
    if code == 1:
        assert err.startswith("dimap: error: ")
        assert err.count("\n") == 1
    return " ".join(err.split())


# prune


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["module", "global", "layer"])
def test_prune_gives_what_the_python_api_gives(run, dtype, scope):
    save_file(swin(dtype), "in.safetensors", {"format": "pt", "note": "kept"})
    code, out, err = run(
        "prune", "in.safetensors", "out.safetensors", "--sparsity", 0.55, "--scope", scope,
        "--masks", "masks.safetensors", "--report", "report.json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "wrote out.safetensors, masks.safetensors, report.json" in out
    want = swin(dtype)
    pruning = dimap.prune(want, 0.55, scope=scope)
    assert same(load_file("out.safetensors"), want)
    masks = dimap.load_masks("masks.safetensors")
    assert same(masks, pruning.masks)
    with safe_open("out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    with open("report.json") as file:
        report = json.load(file)
    assert report["scope"] == scope
    assert report["kept"] == report["weights"] - sum(int((~m).sum()) for m in masks.values())
    again = swin(dtype)
    dimap.apply_masks(again, masks)
    assert same(again, want)


@pytest.mark.parametrize("options", [
    {"method": "lamp"}, {"method": "uniform"}, {"method": "global_magnitude"}, {"scope": "type"},
    {"method": "lamp", "scope": "block"}, {"method": "global_magnitude", "normalize": "layer"},
])  # fmt: skip
def test_methods_and_scopes_are_those_of_the_python_api(run, options):
    save_file(swin(torch.float32), "in.safetensors")
    torch.save(swin(torch.float32), "in.pth")
    given = [text for name, value in options.items() for text in (f"--{name}", value)]
    for source, out in (("in.safetensors", "out.safetensors"), ("in.pth", "out.pth")):
        assert run("prune", source, out, "-s", 0.6, *given, "--masks", f"{out}.masks")[0] == 0
        pruning = dimap.prune(swin(torch.float32), 0.6, **options)
        assert same(dimap.load_masks(f"{out}.masks"), pruning.masks)


def test_outputs_can_be_read_by_others_as_the_umask_says(run):
    os.chmod("in.safetensors", 0o666)
    run("prune", "in.safetensors", "out.safetensors", "-s", 0.5, "--masks", "m.st")
    with open("plain", "w"):
        pass
    modes = {os.stat(name).st_mode for name in ("plain", "out.safetensors", "m.st")}
    assert len(modes) == 1


def test_prune_with_another_share_for_a_module(run):
    run("prune", "in.safetensors", "out.safetensors", "-s", 0.5, "--module", "qkv=0.25")
    want = swin()
    dimap.prune(want, {"qkv": 0.25, "proj": 0.5, "mlp": 0.5})
    assert same(load_file("out.safetensors"), want)


def test_prune_with_a_share_for_every_module_needs_no_sparsity(run):
    options = [x for m in ("qkv=0", "proj=1", "mlp=0.5") for x in ("--module", m)]
    assert run("prune", "in.safetensors", "out.safetensors", *options)[0] == 0
    want = swin()
    dimap.prune(want, {"qkv": 0.0, "proj": 1.0, "mlp": 0.5})
    assert same(load_file("out.safetensors"), want)


def test_prune_with_another_normalization(run):
    arguments = ["-s", 0.5, "--normalize", "module", "--scope", "global"]
    assert run("prune", "in.safetensors", "out.safetensors", *arguments)[0] == 0
    want = swin()
    dimap.prune(want, 0.5, normalize="module", scope="global")
    assert same(load_file("out.safetensors"), want)


def test_prune_a_folder_of_shards(run):
    os.mkdir("in")
    state = swin()
    half = len(state) // 2
    weight_map = {n: f"model-{1 + (i >= half)}.safetensors" for i, n in enumerate(state)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, f"in/{file}")
    with open("in/model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": weight_map}, file)
    with open("in/pytorch_model.bin", "w") as file:
        file.write("old")
    code, out, _ = run("prune", "in", "out", "-s", 0.55)
    assert code == 0
    assert "pytorch_model.bin is kept as it is: its weights are not pruned" in out
    dimap.prune(state, 0.55)
    got = {n: load_file(f"out/{file}")[n] for n, file in weight_map.items()}
    assert same(got, state)
    assert sorted(os.listdir("out")) == sorted(os.listdir("in"))


def test_prune_a_pickled_file_and_to_safetensors(run):
    torch.save({"model": swin(), "epoch": 3}, "in.pth")
    assert run("prune", "in.pth", "out.pth", "-s", 0.55)[0] == 0
    assert run("prune", "in.pth", "made.safetensors", "-s", 0.55)[0] == 0
    want = swin()
    dimap.prune(want, 0.55)
    got = torch.load("out.pth", weights_only=True)
    assert same(got["model"], want)
    assert got["epoch"] == 3
    assert same(load_file("made.safetensors"), want)
    assert same(torch.load("in.pth", weights_only=True)["model"], swin())


def test_a_key_and_copies(run):
    other = {name: tensor + 1 for name, tensor in swin().items()}
    torch.save({"student": swin(), "teacher": other, "epoch": 3}, "in.pth")
    for arguments in (["prune", "in.pth", "o.pth", "-s", 0.5], ["inspect", "in.pth"]):
        message = fails(run, *arguments)
        assert "must hold one set of weights, got 'student', 'teacher': --key NAME" in message
    assert run("prune", "in.pth", "o.pth", "-s", 0.5, "--key", "teacher")[0] == 0
    assert torch.load("o.pth", weights_only=True).keys() == {"teacher", "epoch"}
    assert run("inspect", "in.pth", "--key", "student")[0] == 0
    _, out, _ = run("prune", "in.pth", "all.pth", "-s", 0.5, "--all-copies", "--masks", "m")
    assert "'teacher', a copy of these weights, is given the same masks" in out
    got, masks = torch.load("all.pth", weights_only=True), dimap.load_masks("m")
    dimap.apply_masks(other, masks)
    assert same(got["teacher"], other)
    want = swin()
    dimap.prune(want, 0.5)
    assert same(got["student"], want)


def test_prune_json_is_one_object_on_stdout(run):
    code, out, err = run("prune", "in.safetensors", "out.safetensors", "-s", 0.55, "--json")
    assert (code, err) == (0, "")
    got = json.loads(out)
    assert (got["in"], got["out"], got["masks"]) == ("in.safetensors", "out.safetensors", None)
    assert got["report"]["schema"] == "dimap.report"
    assert got["report"]["flops"] is None


def test_prune_of_nothing_and_of_everything(run):
    for share in (0, 1):
        assert run("prune", "in.safetensors", f"{share}.safetensors", "-s", share)[0] == 0
    assert same(load_file("0.safetensors"), swin())
    assert not load_file("1.safetensors")["layers.0.blocks.0.attn.qkv.weight"].any()
    assert run("prune", "1.safetensors", "2.safetensors", "-s", 0.5)[0] == 0


def test_force_replaces_all_outputs(run):
    arguments = ["prune", "in.safetensors", "out.safetensors", "--masks", "m", "--report", "r"]
    assert run(*arguments, "-s", 0.5)[0] == 0
    assert run(*arguments, "-s", 0.25, "--force")[0] == 0
    want = swin()
    pruning = dimap.prune(want, 0.25)
    assert same(load_file("out.safetensors"), want)
    assert same(dimap.load_masks("m"), pruning.masks)


# FLOPs


def test_flops_of_a_timm_model_and_of_its_output(run):
    pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    arguments = ["prune", f"timm:{name}", "a.safetensors", "-s", 0.5, "--random-init", "--json"]
    first = json.loads(run(*arguments)[1])["report"]
    assert 0.4 < first["flops_nominal"] / first["flops_dense"] < 0.6
    second = json.loads(run("prune", "a.safetensors", "b.safetensors", "-s", 0.5, "--json")[1])
    assert second["report"]["flops_dense"] == first["flops_dense"]
    assert second["report"]["model"] == "VisionTransformer"


def test_flops_of_a_fine_tuned_model_whose_name_is_given(run):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    torch.save({n: torch.rand(t.shape) for n, t in model.state_dict().items()}, "in.pth")
    arguments = ["-s", 0.5, "--json", "--timm-model", "vit_tiny_patch16_224"]
    code, out, _ = run("prune", "in.pth", "out.pth", *arguments, "--input-size", "3x224x224")
    assert code == 0
    assert json.loads(out)["report"]["input_size"] == [3, 224, 224]
    code, _, err = run("prune", "in.pth", "o.pth", *arguments, "--input-size", 225)
    assert "counting FLOPs needs a forward pass of VisionTransformer on an input" in err
    assert "of shape [1, 3, 225, 225]" in err
    assert (code, os.path.exists("o.pth")) == (1, False)


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("source", ["vit.safetensors", "vit.pth"])
def test_an_output_says_the_model_that_was_named(run, source, form):
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32)
    (save_file if source.endswith("s") else torch.save)(vit.state_dict(), source)
    named = ["--model", "timm:vit_tiny_patch16_224", "--input-size", "32", "--format", form]
    assert run("prune", source, "o.safetensors", "-s", "0.5", *named)[0] == 0
    assert run("prune", source, "same.safetensors", "-s", "0.5", *named)[0] == 0
    assert Path("o.safetensors").read_bytes() == Path("same.safetensors").read_bytes()
    want = dict(vit.state_dict())
    dimap.prune(want, 0.5)
    assert same(dimap.load_file("o.safetensors"), want)
    if form != "dense":
        run("expand", "o.safetensors", "dense.safetensors")
        os.rename("dense.safetensors", "o.safetensors")
    code, out, err = run("prune", "o.safetensors", "p.safetensors", "--flops", "50%", "--json")
    assert code == 0, err
    assert json.loads(out)["report"]["input_size"] == [3, 32, 32]


def test_flops_of_a_timm_class_with_arguments(run):
    pytest.importorskip("timm")
    from timm.models.swin_transformer import SwinTransformer

    config = {"img_size": 16, "in_chans": 1, "num_classes": 3, "embed_dim": 8, "window_size": 2,
              "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2}  # fmt: skip
    model = SwinTransformer(**config)
    name = "timm.models.swin_transformer.SwinTransformer"
    metadata = {"architecture": name, "config": json.dumps(config)}
    save_file(model.state_dict(), "own.safetensors", metadata)
    report = json.loads(run("prune", "own.safetensors", "o.safetensors", "-s", 0.5, "--json")[1])
    assert report["report"]["input_size"] == [1, 16, 16]
    assert report["report"]["flops"] < report["report"]["flops_dense"]


@pytest.mark.parametrize(
    "name", ["os.path.join", "timm.models.swin_transformer.checkpoint_seq", "x"]
)
def test_architecture_in_a_file_that_is_no_timm_model_costs_only_the_flops(run, name):
    pytest.importorskip("timm")
    save_file(swin(), "in.safetensors", {"architecture": name})
    report = json.loads(run("prune", "in.safetensors", "o.safetensors", "-s", 0.5, "--json")[1])
    assert report["report"]["flops"] is None
    assert "no FLOPs: " in report["report"]["notes"][0]


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            "timm:swin_tiny_patch4_window7_224",
            "the weights must be those of timm's swin_tiny_patch4_window7",
        ),
        ("swin_tinny", "timm must know the model, got 'swin_tinny'; near it are swin"),
        (
            "torchvision:swin_tt",
            "torchvision must know the model, got 'swin_tt'; near it are swin_t",
        ),
        ("torchvision:swin_t", "model must be the one whose weights these are: layers.0.blocks.0"),
        (".", "timm must know the model, got '.'"),
    ],
)
def test_a_model_that_is_named_and_does_not_fit_is_an_error_before_any_work(run, model, problem):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    code, _, err = run("prune", "in.safetensors", "o.safetensors", "-s", 0.5, "--model", model)
    assert (code, os.listdir()) == (1, ["in.safetensors"])
    assert problem in err


def test_an_input_size_without_a_model_is_an_error_before_any_work(run):
    arguments = ["prune", "in.safetensors", "o.safetensors", "-s", 0.5, "--input-size", 224]
    code, _, err = run(*arguments)
    assert (code, os.listdir()) == (1, ["in.safetensors"])
    assert "IN does not say which model it is: give --model timm:NAME" in err


def test_missing_flops_are_told_only_with_a_report(run):
    told = json.loads(run("prune", "in.safetensors", "o.safetensors", "-s", 0.5, "--json")[1])
    assert told["report"]["notes"] == []
    arguments = ["-s", 0.5, "--force", "--report", "r.json"]
    out = run("prune", "in.safetensors", "o.safetensors", *arguments)[1]
    assert "no FLOPs: IN does not say which model it is" in " ".join(out.split())


def flops_of(run, source, *arguments):
    code, out, err = run("prune", source, "out" if os.path.isdir(source) else f"out{source[-4:]}",
                         "-s", 0.5, "--json", *arguments)  # fmt: skip
    assert code == 0, err
    return json.loads(out)["report"]


def test_flops_of_torchvision_s_files(run):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        model = models.swin_t(num_classes=7)
    torch.save({n: torch.rand(t.shape) for n, t in model.state_dict().items()}, "in.pth")
    report = flops_of(run, "in.pth", "--model", "torchvision:swin_t")
    assert report["flops_dense"] == count_flops(model).total
    assert report["flops"] < report["flops_dense"]
    arguments = ("-s", 0.5, "--model", "torchvision:swin_t")
    assert run("prune", "in.pth", "said.safetensors", *arguments)[0] == 0
    _, out, _ = run("prune", "said.safetensors", "again.safetensors", "-s", 0.5, "--json")
    assert json.loads(out)["report"]["flops_dense"] == report["flops_dense"]
    # A larger model of the same names holds all of these weights, too.
    arguments = ["-s", 0.5, "--model", "torchvision:swin_s"]
    code, _, err = run("prune", "in.pth", "more.pth", *arguments)
    assert (code, os.path.exists("more.pth")) == (1, False)
    assert "it has 24 of features.*.*.attn.qkv.weight, the weights have 12" in err


@pytest.mark.parametrize("kind", ["swin", "bert", "llama", "clip"])
def test_flops_of_folders_of_transformers_by_their_config(run, kind):
    library = pytest.importorskip("transformers")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text, images = {**small, "vocab_size": 99}, {**small, "image_size": 32}
    model = {
        "swin": lambda: library.SwinForImageClassification(
            library.SwinConfig(
                image_size=32, window_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2]
            )
        ),
        "bert": lambda: library.BertForMaskedLM(library.BertConfig(**text)),
        "llama": lambda: library.LlamaForCausalLM(library.LlamaConfig(**text)),
        "clip": lambda: library.CLIPModel(
            library.CLIPConfig(text_config=text, vision_config={**images, "patch_size": 8})
        ),
    }[kind]()
    model.save_pretrained("in")
    report = flops_of(run, "in")  # which would take seconds that nobody asked for
    assert report["flops"] is None
    assert not any("no FLOPs" in note for note in report["notes"])
    report = flops_of(run, "in", "--report", "report.json", "--force")
    size = {"bert": [512], "llama": [2048]}.get(kind, [3, 32, 32])
    assert report["input_size"] == size
    assert report["flops_dense"] == count_flops(model).total
    pruned = [module for module in report["modules"] if module["name"] != "aux"]
    assert all(module["flops"] == module["flops_dense"] / 2 for module in pruned) == (
        kind != "swin"
    )
    assert report["flops"] < report["flops_dense"]
    if kind == "llama":
        fewer = flops_of(run, "in", "--input-size", 64, "--force")
        assert (fewer["input_size"], fewer["modules"][0]["flops_dense"]) == (
            [64], pruned[0]["flops_dense"] / 32,
        )  # fmt: skip


# inspect


def test_inspect(run):
    code, out, err = run("inspect", "in.safetensors")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["qkv"] == ["qkv", "2", "384", "384", "0.00", "%", "float32"]
    assert "swin:" in rows["family"]


def test_inspect_json_of_a_pruned_file(run):
    run("prune", "in.safetensors", "out.safetensors", "-s", 0.5)
    code, out, err = run("inspect", "out.safetensors", "--json")
    assert (code, err) == (0, "")
    got = json.loads(out)
    qkv = got["modules"][0]
    assert (qkv["name"], qkv["weights"], qkv["nonzero"], qkv["sparsity"]) == ("qkv", 384, 192, 0.5)
    assert [layer["name"] for layer in qkv["layers"]] == [
        f"layers.0.blocks.{i}.attn.qkv" for i in (0, 1)
    ]
    assert got["family"]["name"] == "swin"
    assert got["metadata"]["note"] == "kept"
    assert sum(module["weights"] for module in got["modules"]) == got["weights"]


def test_inspect_float8_and_mixed_dtypes(run):
    state = swin() | {"head.fc.weight": torch.zeros(10, 8).to(torch.float8_e4m3fn)}
    save_file(state, "mixed.safetensors")
    got = json.loads(run("inspect", "mixed.safetensors", "--json")[1])
    aux = got["modules"][-1]
    assert aux["dtypes"] == ["float32", "float8_e4m3fn"]
    assert aux["nonzero"] == aux["weights"] - 80


def test_inspect_an_unknown_model(run):
    save_file({"a.weight": torch.ones(3, 3)}, "odd.safetensors")
    code, out, err = run("inspect", "odd.safetensors")
    assert (code, err) == (0, "")
    assert "of no known family" in out
    assert "a.weight (3, 3)" in out


# Errors


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["gone.safetensors", "o.safetensors"], "gone.safetensors: No such file or directory"),
        (["in.safetensors", "in.safetensors"], "must not be the checkpoint that is read"),
        (["in.safetensors", "gone/o.safetensors"], "gone/o.safetensors: must be in a folder"),
        (["in.safetensors", "o.pth"], "must end in .safetensors, got o.pth"),
        (["in.safetensors", "o.safetensors", "--masks", "o.safetensors"], "masks must lie apart"),
        (["in.safetensors", "o.safetensors", "--report", "in.safetensors"], "apart from IN"),
        (["in.safetensors", "o.safetensors", "--masks", "m", "--report", "./m"], "from masks"),
        (["in.safetensors", "o.safetensors", "--masks", "gone/m"], "gone/m: must be in a folder"),
        (
            ["in.safetensors", "o.safetensors", "--module", "head=1"],
            "one of qkv, proj, mlp, got head",
        ),
        (["in.safetensors", "o.safetensors", "--random-init"], "are only for timm:NAME"),
    ],
)
def test_prune_refuses(run, arguments, want):
    assert want in fails(run, "prune", *arguments, "-s", 0.5)


@pytest.mark.parametrize("share", [-0.1, 1.1, "nan"])
def test_sparsity_out_of_range(run, share):
    arguments = ("in.safetensors", "o.safetensors", f"--sparsity={share}")
    message = fails(run, "prune", *arguments, code=2)
    assert "'--sparsity' / '-s': must be in [0, 1], got" in message


def test_shares_that_leave_a_module_out(run):
    message = fails(run, "prune", "in.safetensors", "o.safetensors", "--module", "qkv=0.5")
    assert "give --sparsity, or --module NAME=SHARE for proj and mlp too" in message


@pytest.mark.parametrize("option", ["--masks", "--report", None])
def test_existing_output_is_kept_without_force(run, option):
    with open("taken.safetensors", "w") as file:
        file.write("old")
    out = ["o.safetensors", option, "taken.safetensors"] if option else ["taken.safetensors"]
    message = fails(run, "prune", "in.safetensors", *out, "-s", 0.5)
    assert "taken.safetensors: exists already and is replaced only by force (--force)" in message


def test_the_picture_comes_first(run):
    code, _, err = run("plot", "in.safetensors", "o.png", "x")
    assert code == 2
    assert "the picture comes first, one of kept, weights, mask, accuracy" in err
    assert err.startswith("dimap: error: ")


@pytest.mark.parametrize("name", ["r.txt", "r.html", "r.JSON"])
def test_a_report_is_json_or_a_folder(run, name):
    message = fails(run, "prune", "in.safetensors", "o.safetensors", "-s", 0.5, "--report", name)
    assert f"report must be a file that ends in .json, or a folder, got {name}" in message


def test_usage_errors_look_as_others_do(run):
    for options in (("-s", 2), ("--scope", "head"), ("--nix",), ()):
        code, out, err = run("prune", "in.safetensors", "o.safetensors", *options)
        assert (code, out) == (2, "")
        assert err.startswith("dimap: error: ")
        assert "Value error" not in err
        assert err.rstrip().endswith("(see dimap prune --help)")
        assert err.count("\n") == 1


def test_a_convolutional_network_is_inspected(run):
    save_file(
        {f"layer1.{i}.conv1.weight": torch.ones(4, 4, 3, 3) for i in range(2)}, "c.safetensors"
    )
    code, out, _ = run("inspect", "c.safetensors")
    assert code == 0
    assert "its names do not say what to prune: all is under aux" in out
    assert "looks like a convolutional network" in " ".join(out.split())


def test_nan_weights_are_named(run):
    state = swin()
    state["layers.0.blocks.1.mlp.fc1.weight"][3, 1] = float("nan")
    save_file(state, "nan.safetensors")
    message = fails(run, "prune", "nan.safetensors", "o.safetensors", "-s", 0.5, "--masks", "m")
    assert "layers.0.blocks.1.mlp.fc1.weight must be finite, got nan" in message


def test_truncated_file(run):
    with open("in.safetensors", "r+b") as file:
        file.truncate(os.path.getsize("in.safetensors") - 10)
    message = fails(run, "prune", "in.safetensors", "o.safetensors", "-s", 0.5)
    assert "in.safetensors must be a complete safetensors file" in message


def test_brackets_in_names_are_no_markup(run):
    assert "[red]x.safetensors: No such" in fails(run, "inspect", "[red]x.safetensors")


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ([], "give --sparsity, or --module NAME=SHARE for every module"),
        (["-s", "much"], "--sparsity"),
        (["-s", "0.5", "--module", "qkv"], "--module must be NAME=SHARE, got 'qkv'"),
        (["--module", "qkv=1", "--module", "qkv=0"], "must name a module once, got 'qkv' twice"),
        (["-s", "0.5", "--scope", "head"], "head"),
        (["-s", "0.5", "--method", "taylor"], "taylor"),
        (["-s", "0.5", "--input-size", "0"], "--input-size must be like 224 or 3x224x224"),
        (["-s", "0.5", "--input-size", "1x2x3x4"], "--input-size must be like 224 or 3x224x224"),
    ],
)
def test_usage_errors_exit_with_2(run, arguments, want):
    message = fails(run, "prune", "in.safetensors", "o.safetensors", *arguments, code=2)
    assert want in message


def test_debug_raises(run, monkeypatch):
    with pytest.raises(FileNotFoundError):
        app(["inspect", "gone.safetensors", "--debug"], standalone_mode=False)
    monkeypatch.setenv("DIMAP_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        app(["inspect", "gone.safetensors"], standalone_mode=False)


def test_unexpected_error_is_one_line_too(run, monkeypatch):
    def broken(*_):
        raise KeyError("cause\nmore")

    monkeypatch.setattr("dimap.checkpoint.inspect.inspect", broken)
    assert "KeyError" in fails(run, "inspect", "in.safetensors")


def test_failing_at_the_end_leaves_nothing(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dimap.checkpoint.native.Told.finish", full)
    arguments = ["o.safetensors", "-s", 0.5, "--masks", "m", "--report", "r"]
    message = fails(run, "prune", "in.safetensors", *arguments)
    assert "o.safetensors: No space left on device" in message


# The whole program


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.splitlines()[0] == f"dimap {dimap.__version__}"
    assert f"  torch: {torch.__version__}" in out.splitlines()


def test_module_is_the_command_and_shows_no_bar_without_a_terminal(run):
    command = [
        sys.executable,
        "-m",
        "dimap",
        "prune",
        "in.safetensors",
        "o.safetensors",
        "-s",
        "0.5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "wrote o.safetensors" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "in.safetensors"], ["families"]])
def test_results_that_cannot_be_printed(run, arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dimap", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "No space left on device" in done.stderr


def test_flops_of_a_model_for_images_of_another_size(run):
    vit = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", img_size=32)
    save_file(vit.state_dict(), "vit.safetensors")
    flops = ("--timm-model", "vit_tiny_patch16_224", "--input-size", "32", "--json")
    code, out, err = run("prune", "vit.safetensors", "o.safetensors", "-s", "0.5", *flops)
    assert code == 0, err
    assert json.loads(out)["report"]["input_size"] == [3, 32, 32]


def test_an_output_is_as_private_as_its_input(run):
    os.chmod("in.safetensors", 0o600)
    run("prune", "in.safetensors", "o.safetensors", "-s", "0.5")
    assert os.stat("o.safetensors").st_mode & 0o777 == 0o600


INTERRUPTED = """
import os, signal, sys
from dimap.checkpoint import streaming
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
number, place = int(sys.argv.pop(1)), streaming.place_of
def place_and_end(*args):
    os.kill(os.getpid(), number)
    return place(*args)
streaming.place_of = place_and_end
from dimap.cli import main
main()
"""


def prune_interrupted(number):
    command = [sys.executable, "-c", INTERRUPTED, str(int(number))]
    command += ["prune", "in.safetensors", "o.safetensors", "-s", "0.5", "--masks", "m"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_while_writing_leaves_nothing(run, number, code):
    done = prune_interrupted(number)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert os.listdir() == ["in.safetensors"]


def test_killed_while_writing_leaves_temporaries_that_are_told_by_their_names(run):
    assert prune_interrupted(signal.SIGKILL).returncode == -signal.SIGKILL
    left = sorted(os.listdir())
    assert [name.split(".")[1] for name in left] == ["m", "o", "safetensors"]
    assert all(name.endswith(".dimap-tmp") for name in left[:2])
    assert same(load_file("in.safetensors"), swin())


# The bar


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "TTY_COMPATIBLE": "1"}.items():
        monkeypatch.setenv(name, value)


def test_bar_on_a_terminal_after_a_while(terminal, monkeypatch, capsys):
    monkeypatch.setattr("dimap.cli.progress.DELAY", 0.0)
    with Bar("opening") as bar:
        bar._timer.join()
        bar.step("writing", 4)
        bar.advance(3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "writing" in err


def test_no_bar_for_short_work(terminal, monkeypatch, capsys):
    monkeypatch.setattr("dimap.cli.progress.DELAY", 3600.0)
    with Bar("opening") as bar:
        bar.step("writing", 3)
        bar.advance(3)
    assert capsys.readouterr() == ("", "")


def test_no_bar_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("dimap.cli.progress.DELAY", 0.0)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with Bar("opening") as bar:
        bar.step("writing", 3)
        bar.advance(3)
    assert capsys.readouterr() == ("", "")
