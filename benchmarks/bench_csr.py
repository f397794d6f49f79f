"""What zeros are worth to torch's own sparse product on a CPU, beside the dense one.

    python benchmarks/bench_csr.py [--save]

The first layer of an MLP of Swin-B's third stage, 2048 x 512 float32, times 196 tokens, zeros anywhere, one thread.
Processor time, in turns: other work on the machine disturbs it least. --save writes benchmarks/results/csr.json.
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import torch

SPARSITIES = (0.0, 0.55, 0.7, 0.8, 0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 512, generator=generator)
    tokens = torch.randn(196, 512, generator=generator)
    places = torch.randperm(weight.numel(), generator=generator)
    sparse = []
    for sparsity in SPARSITIES:
        pruned = weight.clone()
        pruned.view(-1)[places[: round(sparsity * weight.numel())]] = 0
        sparse.append(pruned.to_sparse_csr())
    jobs = [lambda: tokens @ weight.T, *(lambda csr=csr: csr @ tokens.T for csr in sparse)]
    rounds: list[list[float]] = [[] for _ in jobs]
    for _ in range(41):
        for times, job in zip(rounds, jobs, strict=True):
            start = time.process_time()
            job()
            times.append(time.process_time() - start)
    dense, *others = (statistics.median(times[1:]) for times in rounds)
    rows = [
        {"sparsity": s, "beside dense": seconds / dense}
        for s, seconds in zip(SPARSITIES, others, strict=True)
    ]
    print(*rows, sep="\n")
    if args.save:
        harness.save("csr", {"machine": harness.machine(), "rows": rows})


if __name__ == "__main__":
    main()
