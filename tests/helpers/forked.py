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

IMPORTS = ["torch", "safetensors.torch", "dimap.stream", "dimap.cli.prune"]
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    code = int(server.recv(16) or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def python(*imports: str) -> str:
    """The path of a `python` whose programs find these imported. It lives as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    path, address = folder / "python", str(folder / "socket")
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address, *IMPORTS, *imports])
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
            given = json.load(file)
        program = os.fork()
        if program:
            attend(client, program)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    return given


def attend(client: socket.socket, program: int) -> None:
    """Tell the client how its program ends; the program ends where the client does."""
    os.closerange(0, 3)
    both = select.poll()
    both.register(client, 0)
    both.register(os.pidfd_open(program), select.POLLIN)
    if any(file == client.fileno() for file, _ in both.poll()):
        os.kill(program, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    try:
        client.sendall(str(code).encode())
    finally:
        os._exit(0)


def run(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
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
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()
    try:
        run(*serve(sys.argv[1]))
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
