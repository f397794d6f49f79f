"""The same bits of masks, pruned weights and scores on hard weights: any threads, any instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable

import dimap
import pytest
import torch
from dimap import ops
from distributions import DISTRIBUTIONS
from problems import DTYPES, cast
from torch import Tensor


def digest(tensors: Iterable[Tensor]) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.view(torch.uint8).numpy())
    return h.hexdigest()[:16]


def results(name: str, dtype: torch.dtype) -> tuple[str, str, str]:
    """Hashes of masks with thresholds, of pruned weights, of scores."""
    weights = [cast(w, dtype) for w in DISTRIBUTIONS[name](300_000)]
    layers = list(range(len(weights)))
    modules = [i % 2 for i in layers]
    totals = [sum(w.numel() for w in weights[m::2]) for m in (0, 1)]
    args = (layers, modules, [round(0.45 * n) for n in totals])
    masks, thresholds = ops.select_cuts(weights, *args)
    scores = ops.score(weights, layers)
    ops.prune_(weights, *args)
    return digest([*masks, thresholds]), digest(weights), digest(scores)


def shared_scores() -> str:
    """Of a layer that all threads work on, and of one between several tensors."""
    weights = DISTRIBUTIONS["normal"](9_000_000)
    return digest(ops.score(weights, [0, 0, 0]))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_threads(name: str, threads) -> None:
    seen: dict[int, list] = {}
    for n in (1, 2, 3, 8, 16):
        threads(n)
        seen[n] = [results(name, dtype) for dtype in DTYPES]
    assert all(found == seen[1] for found in seen.values())


def test_threads_on_a_shared_layer(threads) -> None:
    seen = set()
    for n in (1, 2, 5, 16):
        threads(n)
        seen.add(shared_scores())
    assert len(seen) == 1


CODE = """
import dimap, torch, test_same_everywhere as t
torch.set_num_threads(2)
print(dimap.build_info()["instruction_set"])
for name in t.DISTRIBUTIONS:
    for dtype in t.DTYPES:
        print(name.replace(" ", "_"), dtype, *t.results(name, dtype))
print("shared layer", "-", "-", t.shared_scores())
"""


@pytest.fixture(scope="module")
def by_instruction_set() -> dict[str, list[list[str]]]:
    """What each instruction set gives: [distribution, type, masks, pruned, scores] in each row."""
    found = {}
    for isa in dimap.build_info()["instruction_sets"]:
        run = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "DIMAP_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        name, *lines = run.stdout.splitlines()
        assert name == isa
        found[isa] = [line.split() for line in lines]
    return found


def test_masks_of_every_instruction_set(by_instruction_set) -> None:
    for isa, rows in by_instruction_set.items():
        for row, want in zip(rows, by_instruction_set["portable"], strict=True):
            assert row[:4] == want[:4], isa


def test_scores_of_every_instruction_set(by_instruction_set) -> None:
    for isa, rows in by_instruction_set.items():
        for row, want in zip(rows, by_instruction_set["portable"], strict=True):
            assert row == want, isa
