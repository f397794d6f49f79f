"""Processes of a gloo group that run functions of the tests: started once, used by many tests.

All are forked from one process that has imported what they need, which takes seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta

WAIT = 120  # seconds for any answer
PRELOAD = [
    "dimap.cli.prune_many",
    "dimap.distributed._dtensor",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]


def start(function, *args):
    """function(*args) in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(rank, size, port):
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in names.items()
    }


def _serve(rank, size, port, pipe):
    os.environ.update(environment(rank, size, port))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=WAIT))
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((function(*args), None))
        except Exception as error:
            pipe.send((type(error).__name__, f"{error}\n{traceback.format_exc()}"))


class Group:
    """`size` ranks. Calls give one result for each rank, in their order."""

    def __init__(self, size):
        port = free_port()
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            mine, theirs = multiprocessing.Pipe()
            self.pipes.append(mine)
            self.processes.append(start(_serve, rank, size, port, theirs))

    def outcomes(self, function, *args):
        """(result, None), or (name of the exception, its message and traceback), of each rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        for pipe in self.pipes:
            assert pipe.poll(WAIT), "a rank hangs"
        return [pipe.recv() for pipe in self.pipes]

    def __call__(self, function, *args):
        results = self.outcomes(function, *args)
        for _, error in results:
            assert error is None, error
        return [result for result, _ in results]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
