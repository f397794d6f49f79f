"""Ranks that work apart: one that works for long is waited for, one that is gone is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

pytest.importorskip("torch.distributed")

from ranks import environment, free_port, start

SILENCE = 1.5


def work(rank, port, pipe, seconds):
    """Rank 1 works for some seconds, or has an error at once where there are none."""
    os.environ.update(environment(rank, 2, port))
    from dimap.distributed.launch import launched

    begun = time.monotonic()
    try:
        with launched() as ranks:
            ranks.silence = SILENCE
            with ranks.apart():
                pipe.send("apart")
                if rank == 1 and seconds is None:
                    raise ValueError("no more")
                time.sleep(seconds if rank == 1 else 0)
            found = ranks.gather(rank)
        pipe.send((found, time.monotonic() - begun))
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


@pytest.fixture
def pair():
    """Start two ranks; gives their pipes and processes."""
    processes = []

    def begin(seconds):
        port, pipes = free_port(), []
        for rank in range(2):
            mine, theirs = multiprocessing.Pipe()
            processes.append(start(work, rank, port, theirs, seconds))
            pipes.append(mine)
        for pipe in pipes:
            assert pipe.poll(120)
            assert pipe.recv() == "apart"
        return pipes, processes

    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_one_that_works_for_long_is_waited_for(pair):
    pipes, _ = pair(4 * SILENCE)
    for pipe in pipes:
        assert pipe.poll(120)
        found, seconds = pipe.recv()
        assert found == [0, 1]
        assert seconds > 4 * SILENCE


def test_one_that_stands_still_is_taken_for_gone(pair):
    pipes, processes = pair(600)
    os.kill(processes[1].pid, signal.SIGSTOP)
    begun = time.monotonic()
    assert pipes[0].poll(120)
    assert time.monotonic() - begun < 60
    kind, text = pipes[0].recv()
    assert kind == "ConnectionError"
    assert "rank 1 has been silent for" in text


def test_an_error_is_told_when_all_are_done(pair):
    pipes, _ = pair(None)
    outcomes = [pipe.recv() for pipe in pipes if pipe.poll(120)]
    assert outcomes[1] == ("ValueError", "no more")
    assert outcomes[0] == ("RuntimeError", "rank 1 of 2 stopped: no more")
