"""What a person sees: narrow terminals, colours, completion, interruptions, one bar."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import vit
from commands import runner

pytest.importorskip("typer")

import dimap
from dimap.cli.progress import Bar
from rich.console import Console
from safetensors.torch import save_file


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(vit(), "in.safetensors")
    return runner(capsys)


def numbers(text):
    return set(re.findall(r"[\d.,]*\d", text))


@pytest.mark.parametrize("columns", [100, 60, 45, 30, 20])
@pytest.mark.parametrize(
    "command",
    [
        "inspect in.safetensors --layers",
        "prune in.safetensors o.safetensors -s 0.5 --layers",
        "prune in.safetensors --out-dir many -s 0.5",
    ],
)
def test_narrow_tables_lose_columns_and_no_digits(run, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", "200")
    wide = run(*command.split(), *(["--force"] if "prune" in command else []))[1]
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = run(*command.split(), *(["--force"] if "prune" in command else []))
    assert code == 0
    cells = [
        line
        for line in out.splitlines()
        if re.match(r" ?(qkv|proj|mlp|aux|all|\d+(?! done)) ", line)
    ]
    cells += [line[: line.find("%")] for line in out.splitlines() if line.startswith("in.safe")]
    known = numbers(wide)
    assert cells
    assert all(numbers(line) <= known for line in cells), cells
    assert "…" not in "".join(cells)


def test_report_in_80_columns_has_all_of_them():
    report = dimap.prune(vit(), 0.5).report()
    titles = ("module", "layers", "weights", "kept", "removed", "threshold")
    assert all(title in str(report) for title in titles)


@pytest.mark.parametrize(
    "arguments", ["--help", "prune --help", "nothing", "inspect in.safetensors"]
)
def test_no_color_is_no_bold_either(run, arguments):
    program = (
        "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'dimap', *sys.argv[1:]]) >> 8)"
    )
    command = [sys.executable, "-c", program, *arguments.split()]
    found = {}
    for name in ("NO_COLOR", "OTHER"):
        environment = {**os.environ, name: "1", "TERM": "xterm-256color", "COLUMNS": "80"}
        done = subprocess.run(
            command, capture_output=True, env=environment, stdin=subprocess.DEVNULL
        )
        found[name] = re.findall(rb"\x1b\[[\d;]*m", done.stdout)
    assert found["OTHER"]
    assert not found["NO_COLOR"]


@pytest.mark.parametrize(
    ("words", "want"), [("dimap pru", "prune"), ("dimap prune --spa", "--sparsity")]
)
def test_shells_complete_commands_and_their_options(words, want):
    environment = {
        **os.environ,
        "_DIMAP_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "dimap"], capture_output=True, env=environment, text=True
    )
    assert done.stdout.split() == [want]


def test_ctrl_c_while_the_command_is_loaded_prints_no_traceback(tmp_path):
    (tmp_path / "typer.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"sys.path.insert(0, {str(tmp_path)!r}); from dimap.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interruption_says_how_to_go_on(run, monkeypatch):
    from dimap import finetuning
    from dimap.checkpoint import many

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(many, "prune_checkpoint", interrupt)
    code, _, err = run("prune", "in.safetensors", "--out-dir", "many", "-s", "0.5")
    assert (code, err) == (130, "dimap: error: interrupted: the same command goes on\n")
    monkeypatch.setattr(finetuning, "finetune", interrupt)
    command = ("finetune", "in.safetensors", "--data", ".", "--out", "run")
    assert run(*command)[2] == "dimap: error: interrupted\n"
    Path("run").mkdir()
    Path("run", "state.pt").touch()
    for epoch, held in enumerate(("the weights before training", "the weights of epoch 1")):
        Path("run", "history.json").write_text(f'{{"epochs": [{{"epoch": {epoch}}}]}}')
        wanted = f"interrupted: run holds {held}; the same command with --resume goes on from there"
        assert wanted in " ".join(run(*command)[2].split())


def test_no_empty_folders_are_left_behind(run):
    save_file({"other.weight": torch.ones(2, 2)}, "odd.safetensors")
    Path("mine").mkdir()
    code = run(
        "prune",
        "odd.safetensors",
        "--out-dir",
        "a/b",
        "-s",
        "0.5",
        "--masks",
        "m/n",
        "--report",
        "mine",
    )[0]
    assert code == 1
    assert sorted(os.listdir()) == ["a", "in.safetensors", "mine", "odd.safetensors"]
    assert os.listdir("a/b") == ["dimap-manifest.jsonl"]


def test_one_bar_goes_through_all_steps_with_the_time_left(monkeypatch):
    import io

    from dimap.cli import progress

    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(progress, "make_console", lambda **_: console)
    with Bar("opening", whole="pruning") as bar:
        bar._show()
        shares = []
        for step, total in (("reading", 100), ("reading", 100), ("writing", 80)):
            bar.step(step, total)
            for _ in range(total // 20):
                bar.advance(20)
                (task,) = bar._progress.tasks
                assert task.description == "pruning"
                shares.append((task.completed, task.total))
        bar._progress.refresh()
    assert shares[4] == (100, 200)
    assert shares[9] == (200, 300)
    assert shares[-1] == (280, 280)
    assert " left" in drawn.getvalue()


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_stranger_of_the_same_name_is_told(tmp_path, overwritten):
    """Another project's `dimap` in the same folder, installed before this one or over it."""
    home = Path(dimap.__file__).parent
    there = tmp_path / "dimap"
    there.mkdir()
    for path in [*home.iterdir(), Path(dimap._C.__file__)]:
        if path.name != "__pycache__":
            there.joinpath(path.name).unlink(missing_ok=True)
            there.joinpath(path.name).symlink_to(path)
    (tmp_path / "dimap-2.5.0.dist-info").mkdir()
    if overwritten:
        (there / "__init__.py").unlink()
        (there / "__init__.py").write_text("")
    program = (  # an editable install goes before all folders
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
        f"sys.path.insert(0, {str(tmp_path)!r}); from dimap.__main__ import main; main()"
    )
    command = [sys.executable, "-c", program, "families"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "another project's dimap is installed" in done.stderr
    assert "pip uninstall dimap torch-dimap" in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) != overwritten
