"""`import dimap`: light by itself, and complete beside torch in whatever order the two are imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import dimap
import pytest
from checkpoints import vit
from safetensors.torch import save_file

SCORE = "(s,) = torch.ops.dimap.score([torch.tensor([3.0, -1.0])], [0]); assert s[0] == 1, s"


def python(program: str, **more) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, **more)


def check(program: str) -> None:
    done = python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["dimap", "dimap.groups", "dimap.groups.plan", "dimap.families", "dimap._files"]
)
def test_does_not_import_torch(module: str) -> None:
    check(
        f"import {module}, sys; heavy = {{'torch', 'numpy', 'rich', 'typer'}} & set(sys.modules); "
        "assert not heavy, heavy"
    )


@pytest.mark.parametrize("command", ["", "prune", "inspect", "expand", "plot"])
def test_help_imports_what_it_shows_only(command: str) -> None:
    check(
        f"import sys; from dimap.cli import app\ntry: app({[*command.split(), '--help']})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'dimap.checkpoint'} & set(sys.modules); assert not heavy, heavy\n"
        "commands = {m for m in sys.modules if m in ('dimap.cli.prune', 'dimap.cli.finetune')}\n"
        f"assert commands <= {{'dimap.cli.{command}'}}, commands"
    )


@pytest.mark.parametrize(
    "more",
    [
        "o.safetensors --report r.json",
        "o.safetensors --scope row",
        "--out-dir o",
        "--out-dir o --json",
    ],
)
def test_files_are_pruned_without_torch(more: str, tmp_path: Path) -> None:
    save_file(vit(), tmp_path / "a.safetensors")
    command = ["prune", "a.safetensors", *more.split(), "-s", "0.5"]
    done = python(
        f"import sys; from dimap.cli import app\ntry: app({command})\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib'} & set(sys.modules); assert not heavy, heavy",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["dimap, torch", "torch, dimap"])
def test_operators_are_registered_in_either_order(order: str) -> None:
    check(f"import {order}; {SCORE}; assert 'dimap.pruning' not in __import__('sys').modules")


def test_operators_are_registered_by_an_import_of_a_part_of_torch() -> None:
    check(f"import dimap\nfrom torch import nn\nimport torch; {SCORE}")


def test_operators_are_registered_where_a_name_of_dimap_imports_torch() -> None:
    check(f"import dimap; dimap.score\nimport torch; {SCORE}")


def test_looking_for_torch_does_not_use_the_hook_up() -> None:
    check(f"import dimap, importlib.util as u; u.find_spec('torch'); import torch; {SCORE}")


def test_leaves_nothing_behind_in_the_import_system() -> None:
    check(
        "import sys; before = list(sys.meta_path); import dimap, torch; "
        "assert sys.meta_path == before, sys.meta_path; "
        "assert 'exec_module' not in vars(torch.__spec__.loader); import importlib; "
        "importlib.reload(torch.version)"
    )


def test_an_error_of_torch_s_own_import_passes_through(tmp_path: Path) -> None:
    fake = tmp_path / "torch"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')")
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import dimap
for attempt in range(2):
    try:
        import torch
    except OSError as error:
        assert str(error) == "libcudart.so: cannot open" and error.__context__ is None
    else:
        raise SystemExit("no error")
    assert "torch" not in sys.modules
sys.path.pop(0)
import torch
{SCORE}
"""
    check(program)


def test_torch_that_is_not_there_is_said_by_python(tmp_path: Path) -> None:
    check(
        "import sys, dimap; sys.path[:] = []; sys.path_importer_cache.clear()\n"
        "try: import torch\n"
        "except ModuleNotFoundError as error: assert error.name == 'torch'\n"
        "else: raise SystemExit('no error')"
    )


def test_torch_is_well_where_the_operators_are_not(tmp_path: Path) -> None:
    done = python(
        "import sys, warnings, dimap; sys.modules['dimap._library'] = None\n"
        "with warnings.catch_warnings(record=True) as seen: warnings.simplefilter('always'); import torch\n"
        "assert 'torch.ops.dimap is not there' in str(seen[0].message), seen; torch.zeros(1)"
    )
    assert done.returncode == 0, done.stderr


def test_dir_lists_the_names_that_are_not_loaded_yet() -> None:
    check(
        "import dimap; missing = {'score', 'prune', 'finetune', 'ops', 'report', 'Layer', "
        "'prune_checkpoint', '__version__'} - set(dir(dimap)); assert not missing, missing"
    )


@pytest.mark.parametrize("name", dimap.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(dimap, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        dimap.nothing  # noqa: B018


FIRST = """
import importlib, os, sys, traceback
# What takes long, once for all.
for name in ("torch", "safetensors.torch", "rich.console", "typer", "matplotlib.figure", "timm", "torch.distributed.tensor"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
"""
NEEDS = {"dimap.plots": "matplotlib", "dimap.finetuning": "timm", "dimap.cli": "typer"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_every_module_may_come_first() -> None:
    """No circle of imports stands in the way of any."""
    home = Path(dimap.__file__).parent
    files = sorted(p.relative_to(home.parent).with_suffix("") for p in home.rglob("*.py"))
    found = [".".join(f.parts[:-1] if f.name == "__init__" else f.parts) for f in files]
    missing = tuple(p for p, needed in NEEDS.items() if not importlib.util.find_spec(needed))
    names = [n for n in found if not n.startswith((*missing, "dimap.__main__"))]
    assert len(names) > 20
    done = subprocess.run([sys.executable, "-c", FIRST, *names], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
