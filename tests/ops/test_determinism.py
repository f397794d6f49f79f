"""The same bits with any number of threads and any instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import cache

import dimap
import pytest
import torch
from dimap import ops
from problems import DTYPES, cast, values

KINDS = ["normal", "zeros", "grid", "cauchy", "denormals", "equal", "huge and tiny"]


def digest(dtype: torch.dtype) -> str:
    """A hash of masks, thresholds and pruned weights over kinds and sizes."""
    h = hashlib.sha256()
    for kind in KINDS:
        weights = [cast(values(kind, n, n), dtype) for n in (400_003, 65, 9_001)]
        for keep in (150_000, 409_000, 40):
            masks, thresholds = ops.select_cuts(weights, [0, 1, 2], [0, 0, 0], [keep])
            pruned = [w.clone() for w in weights]
            ops.prune_(pruned, [0, 1, 2], [0, 0, 0], [keep])
            for t in (*masks, thresholds, *pruned):
                h.update(t.view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


@cache
def scored(dtype: torch.dtype) -> list[torch.Tensor]:
    weights = [cast(values(kind, 150_001, 5), dtype) for kind in KINDS]
    return [*weights, cast(values("normal", 9_000_000, 6), dtype)]  # the last: by all threads


def scores_digest() -> str:
    h = hashlib.sha256()
    for dtype in DTYPES:
        weights = scored(dtype)
        for s in ops.score(weights, list(range(len(weights)))):
            h.update(s.view(torch.uint8).numpy())
    return h.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_do_not_depend_on_the_number_of_threads(dtype: torch.dtype, threads) -> None:
    seen = set()
    for n in (1, 2, 7, 16):
        threads(n)
        seen.add(digest(dtype))
    assert len(seen) == 1


def test_scores_do_not_depend_on_the_number_of_threads(threads) -> None:
    seen = set()
    for n in (1, 2, 7):
        threads(n)
        seen.add(scores_digest())
    assert len(seen) == 1


def test_every_instruction_set_gives_the_same() -> None:
    code = (
        "import test_determinism as t; import dimap;"
        "print(dimap.build_info()['instruction_set'], *map(t.digest, t.DTYPES))"
    )
    seen = {}
    for isa in dimap.build_info()["instruction_sets"]:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "DIMAP_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        name, *hashes = run.stdout.split()
        assert name == isa
        seen[isa] = hashes
    assert len({tuple(h) for h in seen.values()}) == 1


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import dimap; dimap.build_info()"],
        env={**os.environ, "DIMAP_ISA": "mmx"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "DIMAP_ISA must be one of portable" in run.stderr
