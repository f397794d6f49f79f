"""The tests' own `python` is one: arguments, folder, environment, standard files, errors, signals."""

from __future__ import annotations

import signal
import subprocess

import forked
import pytest


def run(*arguments: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([forked.python(), *arguments], capture_output=True, text=True, **more)


def test_what_a_program_is_given(tmp_path):
    code = "import os, sys; print(sys.argv, os.getcwd(), dict(os.environ)['A'], input())"
    done = run("-c", code, "a b", "ü", cwd=tmp_path, env={"A": "1"}, input="in\n")
    assert done.stdout == f"['-c', 'a b', 'ü'] {tmp_path} 1 in\n", done.stderr
    (tmp_path / "mine.py").write_text("import sys; print(__name__, sys.argv[1:])")
    for how in (["-m", "mine"], ["mine.py"]):
        assert run(*how, "x", cwd=tmp_path).stdout == "__main__ ['x']\n"


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('said')", 1, "said\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'last')", 0, "last"),
    ],
)
def test_how_it_ends(code, status, error):
    done = run("-c", code)
    assert done.returncode == status
    assert done.stderr.endswith(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(tmp_path, number):
    code = (
        "import os, signal, sys, time\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, _: sys.exit(100 + n))\n"
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    command = [forked.python(), "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")  # closed by the program, too
    assert process.returncode == (-number if number == signal.SIGKILL else 100 + number)
