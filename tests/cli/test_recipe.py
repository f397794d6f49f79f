"""Recipes: what the options say, checked, written beside the output, and the same result again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import vit
from commands import runner
from finetune_problems import save_images, save_swin
from safetensors.torch import save_file


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(vit(), "in.safetensors", {"format": "pt"})
    return runner(capsys)


OPTIONS = ["--params", "60%", "--module", "qkv=0.2", "--limit", "mlp=30%:", "--format", "bitmask"]


def test_an_output_is_made_again_by_the_recipe_beside_it(run):
    assert (
        run("prune", "in.safetensors", "a.safetensors", *OPTIONS, "--ignore", r".*0\.attn\.proj")[0]
        == 0
    )
    text = Path("a.safetensors.recipe.toml").read_text()
    assert r'ignore = [".*0\\.attn\\.proj"]' in text
    assert '# got: {"params": 0.' in text
    assert (
        run("prune", "in.safetensors", "b.safetensors", "--recipe", "a.safetensors.recipe.toml")[0]
        == 0
    )
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert Path("b.safetensors.recipe.toml").read_text() == text


def test_recipes_of_two_outputs_stand_side_by_side_and_none_is_replaced_in_silence(run):
    torch.save(vit(), "in.pth")
    told = run("prune", "in.safetensors", "a.safetensors", "-s", "0.5")[1]
    assert ", a.safetensors.recipe.toml in " in told
    run("prune", "in.pth", "a.pth", "-s", "0.6")
    assert "sparsity = 0.5" in Path("a.safetensors.recipe.toml").read_text()
    assert "sparsity = 0.6" in Path("a.pth.recipe.toml").read_text()
    Path("a.safetensors").unlink()
    code, _, err = run("prune", "in.safetensors", "a.safetensors", "-s", "0.7")
    assert (code, Path("a.safetensors").exists()) == (1, False)
    assert "a.safetensors.recipe.toml" in err
    mine = ["--recipe", "a.safetensors.recipe.toml"]  # read, and written again
    assert run("prune", "in.safetensors", "a.safetensors", *mine)[0] == 0
    assert run("prune", "in.safetensors", "a.safetensors", "-s", "0.7", "--force")[0] == 0
    assert "sparsity = 0.7" in Path("a.safetensors.recipe.toml").read_text()


def test_a_recipe_is_printed_from_options_and_the_command_line_goes_first(run):
    code, first, _ = run("recipe", *OPTIONS)
    assert code == 0
    assert first.splitlines()[1:] == [
        'module = ["qkv=0.2"]', 'format = "bitmask"', "params = 0.6", 'limit = ["mlp=30%:"]'
    ]  # fmt: skip
    Path("r.toml").write_text(first)
    assert run("recipe", "--recipe", "r.toml")[1] == first
    assert "params = 0.5" in run("recipe", "--recipe", "r.toml", "--params", "0.5")[1]


def test_no_option_prints_no_option(run):
    assert len(run("recipe")[1].splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nsparsty = 0.5", "r.toml, line 2: sparsty: is no option of dimap prune; did you mean sparsity?"),
        ("sparsity = 1.5", "r.toml, line 1: sparsity: must be in [0, 1], got 1.5"),
        ("sparsity = true", "r.toml, line 1: sparsity: must be a string or a number, got True"),
        ("\n\nmin-keep = 'x'", "r.toml, line 3: min-keep: must be a share as 0.6 or 60%, got 'x'"),
        ("size = 'big'", "r.toml, line 1: size: must be bytes as 120MB or 120MiB, got 'big'"),
        ("scope = 'modul'", "r.toml, line 1: scope: Input should be 'module', 'global'"),
        ("all-copies = 'yes'", "r.toml, line 1: all-copies: Input should be a valid boolean, got 'yes'"),
        ("limit = 'mlp=:1'", "r.toml, line 1: limit: Input should be a valid list, got 'mlp=:1'"),
        ("key = 3\nout-dir = 'x'", "r.toml, line 1: key: Input should be a valid string, got 3; r.toml, line 2: out-dir: is no option"),
        ("= 3", "error: --recipe must be a TOML file, got r.toml: "),
    ],
)  # fmt: skip
def test_what_a_recipe_must_not_say(run, text, message):
    Path("r.toml").write_text(text)
    code, _, err = run("prune", "in.safetensors", "out.safetensors", "--recipe", "r.toml")
    said = " ".join(err.replace("│", " ").split())
    assert code == 2
    assert message in said
    assert sorted(os.listdir()) == ["in.safetensors", "r.toml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "mlp"], "--limit must be PATTERN=LOW:HIGH, got 'mlp'"),
        (["--limit", "mlp=2:"], "--limit mlp=2:: must be in [0, 1], got 2"),
        (["--flops", "x"], "must be a share as 0.6 or 60%, got 'x'"),
        (["--size", "0MB"], "must be bytes as 120MB or 120MiB, got '0MB'"),
        ([], "or a budget as --flops 60%"),
    ],
)  # fmt: skip
def test_wrong_budgets(run, options, message):
    code, _, err = run("prune", "in.safetensors", "out.safetensors", *options)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_many_checkpoints_have_budgets_too(run):
    save_file(vit(seed=1), "other.safetensors")
    files = ["in.safetensors", "other.safetensors"]
    code, out, _ = run(
        "prune", *files, "--out-dir", "out", "--params", "60%", "--max-keep", "80%", "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert told["settings"]["params"] == 0.6
    assert all(each["kept"] <= 0.6 * each["weights"] for each in told["checkpoints"])
    code, out, _ = run(
        "prune", *files, "--out-dir", "out", "--params", "60%", "--max-keep", "80%", "--json"
    )
    assert json.loads(out)["done_before"] == 2


def test_sensitivity_in_numbers_and_with_data(run, tmp_path):
    save_swin(Path("swin.safetensors"))
    images = save_images(tmp_path / "images")
    code, out, err = run(
        "sensitivity", "swin.safetensors", "--json", "--data", images, "--at", "100%", "--at", "0"
    )
    assert code == 0, err
    told = json.loads(out)
    assert [m["name"] for m in told["modules"]] == ["qkv", "proj", "mlp"]
    assert all(m["distortion"][0] == 0 and m["distortion"][100] == 1 for m in told["modules"])
    measured = told["accuracy"]
    assert measured["sparsities"] == [1.0, 0.0]
    assert all(values[1] == measured["dense"] for values in measured["modules"].values())
    code, out, _ = run("sensitivity", "swin.safetensors", "--layers", "--plot", "s.png")
    assert code == 0
    assert "layers.0.blocks.0.mlp.fc1" in out
    assert Path("s.png").stat().st_size > 1000
