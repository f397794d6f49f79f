"""`python`, started at once: forked from a process that has imported what takes seconds.

A program is its own process in all but that: what it is given are its arguments, folder, environment and standard
files; it ends as it ends. Where a test asks what is imported, or what the environment does to an import, it needs
`sys.executable`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

IMPORTS = [
    *(
        "torch.distributed.launcher.api",
        "torch.utils.tensorboard",
        "timm.data",
        "matplotlib.figure",
    ),
    *("dimap.finetuning", "dimap.stream", "dimap.plots", "dimap.cli.prune"),
]
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    code = int(server.recv(16) or 1)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def python() -> str:
    """The path of this `python`, which is there as long as the process of the tests."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    path, address = folder / "python", str(folder / "socket")
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address])
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.wait)
    atexit.register(server.kill)
    while not os.path.exists(address):
        assert server.poll() is None
        time.sleep(0.02)
    return str(path)


def serve(address: str) -> tuple[list[str], str, dict[str, str]]:
    """Fork a process for each client; in that process, return what it is to run."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".new")
        listener.listen(64)
        os.rename(address + ".new", address)
        while True:
            client = listener.accept()[0]
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                break
            client.close()
    with client:
        _, files, _, _ = socket.recv_fds(client, 1, 3)
        with client.makefile("rb") as file:
            given = json.loads(file.readline())
        program = os.fork()
        if program:
            attend(client, program)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return given


def attend(client: socket.socket, program: int) -> None:
    """Pass on the client's signals, then how its program ends; the program ends where the client does."""
    os.closerange(0, 3)
    ended = os.pidfd_open(program)
    while ended not in select.select([client, ended], [], [])[0]:
        os.kill(program, (client.recv(1) or bytes([signal.SIGKILL]))[0])
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        client.sendall(str(code).encode())
    finally:
        os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.environ["PYTHON_EXEC"] = str(
        Path(sys.argv[1]).with_name("python")
    )  # torchrun's for its ranks
    # What is read when an interpreter starts, or torch is imported.
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    while arguments[0] == "-u":
        del arguments[0]
    what, *others = arguments
    if what == "-c":
        code, *sys.argv[1:] = others
        sys.argv[0], sys.path[0] = "-c", ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        sys.argv, sys.path[0] = others, folder
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(what).parent)
        runpy.run_path(what, run_name="__main__")


def leave() -> None:
    """Without taking all modules apart, which takes a second."""
    if code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    code = None  # known where the program does not end by an error
    atexit.register(leave)  # the first: called last
    for name in IMPORTS:
        with suppress(ImportError):  # what is optional
            importlib.import_module(name)
    gc.freeze()
    try:
        run(*serve(sys.argv[1]))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
