"""--pattern, --patterns, --ignore and --family, alike in every command; inspecting the unknown."""

from __future__ import annotations

import json
import re
import shlex

import dimap
import pytest
import torch
from dimap.cli import app
from dimap.cli.grouping import parse
from safetensors.torch import load_file, save_file


def strange() -> dict[str, torch.Tensor]:
    """Blocks under names that no table has."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"stem.weight": (8, 3)}
    for block in range(3):
        start = f"trunk.cells.{block}."
        shapes |= {f"{start}mixing.{x}.weight": (8, 8) for x in ("alpha", "beta", "gamma")}
        shapes |= {f"{start}wide.weight": (32, 8), f"{start}norm.weight": (8,)}
    return {name: torch.randn(s, generator=generator) for name, s in shapes.items()}


def worded() -> dict[str, torch.Tensor]:
    """Blocks whose words say what they are, in an order that no table has."""
    generator = torch.Generator().manual_seed(1)
    shapes = {}
    for block in range(3):
        start = f"trunk.cells.{block}."
        shapes |= {f"{start}attention.to_{x}.weight": (8, 8) for x in ("q", "k", "v", "out")}
        shapes |= {f"{start}mlp.dense1.weight": (16, 8), f"{start}mlp.dense2.weight": (8, 16)}
    return {name: torch.randn(s, generator=generator) for name, s in shapes.items()}


CELLS = r"trunk\.cells\.(?P<block>\d+)\."
PATTERNS = {
    "mix": [rf"{CELLS}mixing\.(?P<part>alpha|beta|gamma)\.weight"],
    "wide": [rf"{CELLS}wide\.weight"],
}
OPTIONS = [
    "--pattern", f"mix={PATTERNS['mix'][0]}", "--pattern", f"wide={PATTERNS['wide'][0]}",
]  # fmt: skip


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_file(strange(), "in.safetensors")
    save_file(worded(), "worded.safetensors")

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            app([str(argument) for argument in arguments], prog_name="dimap")
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_prune_by_patterns(run):
    code, out, err = run("prune", "in.safetensors", "out.safetensors", "-s", 0.5, *OPTIONS)
    assert (code, err) == (0, "")
    assert "mix" in out
    masks = dimap.select(strange(), 0.5, patterns=PATTERNS)
    assert len(masks) == 12
    found = load_file("out.safetensors")
    assert all(torch.equal(found[n], strange()[n] * m) for n, m in masks.items())
    modules = dimap.find_modules(strange(), PATTERNS)
    assert [len(layer.parameters) for layer in modules["mix"]] == [3, 3, 3]


def test_prune_by_patterns_of_a_file(run, tmp_path):
    (tmp_path / "p.toml").write_text(
        "mix = [['"
        + "', '".join(rf"{CELLS}mixing\.{x}\.weight" for x in ("alpha", "beta", "gamma"))
        + f"']]\nwide = '{CELLS}wide\\.weight'\n"
    )
    assert run("prune", "in.safetensors", "a.safetensors", "-s", 0.5, *OPTIONS)[0] == 0
    one = ("prune", "in.safetensors", "b.safetensors", "-s", 0.5, "--patterns", "p.toml")
    assert run(*one)[0] == 0
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_many_are_pruned_by_patterns_and_continued(run):
    command = ("prune", "in.safetensors", "--out-dir", "done", "-s", 0.5, *OPTIONS, "--json")
    first, second = (json.loads(run(*command)[1]) for _ in range(2))
    assert (first["done"], second["done_before"]) == (1, 1)
    code, _, err = run(*command, "--ignore", ".*wide.*")
    assert code == 1
    assert "was made with other settings" in err


def test_family_transformer_shows_what_it_does(run):
    code, out, _ = run(
        "prune", "worded.safetensors", "out.safetensors", "-s", 0.5, "--family", "transformer"
    )
    assert code == 0
    assert (
        "qkv: 3 x trunk.cells.*.attention.to_q.weight + trunk.cells.*.attention.to_k.weight" in out
    )
    masks = dimap.select(worded(), 0.5, family="transformer")
    found = load_file("out.safetensors")
    assert all(torch.equal(found[n], worded()[n] * m) for n, m in masks.items())


def test_a_way_out_of_an_error_can_be_pasted(run):
    code, _, err = run("prune", "worded.safetensors", "out.safetensors", "-s", 0.5)
    assert code == 1
    line = next(line for line in err.splitlines() if line.strip().startswith("--pattern"))
    options = shlex.split(line)
    assert run("prune", "worded.safetensors", "out.safetensors", "-s", 0.5, *options)[0] == 0
    assert "--family transformer" in err


def test_inspect_shows_an_unknown_model_and_proposes(run):
    code, out, err = run("inspect", "in.safetensors")
    assert (code, err) == (0, "")
    assert "of no known family" in out
    assert "3 x trunk.cells.*.wide.weight (32, 8)" in out
    code, out, _ = run("inspect", "worded.safetensors", "--json")
    found = json.loads(out)
    assert (code, found["proposed"], found["family"]) == (0, True, None)
    layers = {m["name"]: len(m["layers"]) for m in found["modules"]}
    assert layers == {"qkv": 3, "proj": 3, "mlp": 6, "aux": 0}
    code, out, _ = run("inspect", "in.safetensors", *OPTIONS, "--json")
    found = json.loads(out)
    assert found["proposed"] is False
    assert [m["name"] for m in found["modules"]] == ["mix", "wide", "aux"]
    assert run("inspect", "in.safetensors", "--family", "swin")[0] == 1


def test_ignore_in_every_command(run):
    ignore = ("--ignore", rf"{CELLS}wide")
    run("prune", "in.safetensors", "out.safetensors", "-s", 0.5, *OPTIONS, *ignore)
    assert torch.equal(
        load_file("out.safetensors")["trunk.cells.0.wide.weight"],
        strange()["trunk.cells.0.wide.weight"],
    )
    code, out, _ = run("inspect", "in.safetensors", *OPTIONS, *ignore)
    assert code == 0
    assert "ignored, thus never pruned" in out
    pytest.importorskip("matplotlib")
    assert run("plot", "kept", "in.safetensors", "a.png", *OPTIONS, *ignore)[0] == 0
    assert run("plot", "kept", "in.safetensors", "b.png")[0] == 1


def test_expand_shows_the_modules(run):
    run("prune", "in.safetensors", "b.safetensors", "-s", 0.5, *OPTIONS, "--format", "bitmask")
    code, out, _ = run("expand", "b.safetensors", "d.safetensors", *OPTIONS, "--json")
    found = json.loads(out)
    assert code == 0
    assert {m["name"]: m["sparsity"] for m in found["modules"]}["wide"] == 0.5
    assert run("expand", "b.safetensors", "e.safetensors")[0] == 0
    code, _, err = run("expand", "b.safetensors", "f.safetensors", "--pattern", "x=nothing")
    assert code == 1
    assert "got none for 'nothing'" in err


@pytest.mark.parametrize("command", ["prune", "inspect", "plot", "finetune", "expand"])
def test_every_command_has_them(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    for option in ("--pattern ", "--patterns", "--ignore", "--family"):
        assert option in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "mix"], "--pattern must be MODULE=REGEX, got 'mix'"),
        (["--pattern", "=x"], "--pattern must be MODULE=REGEX"),
        (["--patterns", "none.toml"], "none.toml: No such file"),
        (["--patterns", "bad.toml"], "must be a TOML file"),
        (["--patterns", "empty.toml"], "must name a module"),
        (["--patterns", "number.toml"], "must be a regex or a list of them, got 3"),
        ([*OPTIONS, "--family", "swin"], "--family must be given without --pattern"),
    ],
)
def test_wrong_options(run, tmp_path, options, message):
    (tmp_path / "bad.toml").write_text("a = ")
    (tmp_path / "empty.toml").write_text("# nothing\n")
    (tmp_path / "number.toml").write_text("a = 3\n")
    code, _, err = run("prune", "in.safetensors", "out.safetensors", "-s", 0.5, *options)
    assert code == 2
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", err).split())


def test_families_are_listed(run):
    code, out, _ = run("families")
    assert code == 0
    assert "torchvision swin, swin_v2" in out
    assert "--family transformer" in out
    found = json.loads(run("families", "--json")[1])
    assert {"swin", "llama", "bert"} <= {family["name"] for family in found}
    code, out, _ = run("families", "gpt2")
    assert code == 0
    assert r"attn\.c_attn\.weight" in out
    code, _, err = run("families", "gtp2")
    assert code == 1
    assert "near it are gpt2" in err


def test_options_become_arguments_that_json_has():
    given = parse(["a=x", "a=y", "b=z=w"], None, ["i"], None)
    assert given == {"patterns": {"a": ["x", "y"], "b": ["z=w"]}, "ignore": ["i"]}
    assert parse(None, None, None, "swin") == {"family": "swin"}
    assert json.loads(json.dumps(given)) == given
    assert parse(None, None, None, None) == {}
