"""Jobs timed in turns in one process, so that a ratio compares like with like however fast the machine
is at the moment."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Job = Callable[[], object]


@dataclass
class Timing:
    """What the rounds of one job took.

    seconds: of each round: wall time, or between two events on a CUDA device.
    page_faults: of each round: pages of fresh memory that the job touched first, which the kernel must
        clear; 0 on a CUDA device.
    """

    seconds: list[float] = field(default_factory=list)
    page_faults: list[int] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of the rounds' seconds."""
        return statistics.median(self.seconds)

    @property
    def faults(self) -> int:
        """The median of the rounds' page faults."""
        return round(statistics.median(self.page_faults))

    def beside(self, other: Timing) -> tuple[float, float, float]:
        """How many times as long as another job: median, and the tenth and the ninetieth percentile.

        Rounds are compared with the other's of the same round; where they have not the same number of
        them, medians are, and there is no spread.
        """
        if len(self.seconds) != len(other.seconds):
            return (self.median / other.median,) * 3
        ratios = sorted(a / b for a, b in zip(self.seconds, other.seconds, strict=True))
        last = len(ratios) - 1
        return statistics.median(ratios), ratios[round(0.1 * last)], ratios[round(0.9 * last)]


def time_in_turns(
    jobs: Mapping[str, Job],
    repeats: Mapping[str, int] | int = 11,
    prepare: Mapping[str, Job] | None = None,
    device: str = "cpu",
    advance: Callable[[int], object] = lambda rounds: None,
) -> dict[str, Timing]:
    """Time each job: one warm-up, then round after round of all of them.

    The clock stops when the job returns (on a CUDA device: when its work is done): its result is
    let go of afterwards. A job that is to be timed once has no warm-up.

    repeats: rounds of each job. prepare: what to do before a job, untimed.
    device: "cpu" or "cuda". advance: called with 1 after each job of each round.
    """
    prepare = prepare or {}
    wanted = {name: repeats if isinstance(repeats, int) else repeats[name] for name in jobs}
    timings = {name: Timing() for name in jobs}
    clock = _on_cuda if device == "cuda" else _on_cpu
    for turn in range(max(wanted.values()) + 1):
        for name, job in jobs.items():
            if turn > wanted[name]:
                continue
            if name in prepare:
                prepare[name]()
            seconds, faults = clock(job)
            if turn or wanted[name] == 1:
                timings[name].seconds.append(seconds)
                timings[name].page_faults.append(faults)
            advance(1)
            if wanted[name] == 1:
                wanted[name] = 0
    return timings


def _on_cpu(job: Job) -> tuple[float, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    result = job()
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    del result
    return seconds, faults


def _on_cuda(job: Job) -> tuple[float, int]:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = job()
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end) / 1e3, 0
