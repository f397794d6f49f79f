"""More than 2^31 weights: in one tensor, and in total. Every decision is asked of, in pieces.

`make test-large` runs them; where memory is short a test is left out.
"""

from __future__ import annotations

import gc

import pytest
import torch
from dimap import ops
from exact import assert_masks, assert_pruned, assert_scores16
from torch import Tensor

pytestmark = pytest.mark.large
OVER = (1 << 31) + 77


def needs(gib: float) -> None:
    gc.collect()
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) for line in f if line.startswith("MemAvailable")) / 2**20
    if free < gib + 2:
        pytest.skip(f"needs {gib} GiB of memory, {free:.1f} are free")


def weights_of(n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """n weights from one block of normal ones, and in the last 1,000 what is nowhere else."""
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    w = torch.empty(n, dtype=dtype)
    for part in w.split(block.numel()):
        part.copy_(block[: part.numel()])
    w[-1000:] = 50
    return w


def test_masks_of_one_tensor_of_2_to_the_31(threads) -> None:
    needs(7)
    threads(2)
    weights = [weights_of(OVER), torch.randn(100_000).bfloat16() * 7]
    n = OVER + 100_000
    args = ([0, 1], [0, 0], [n - round(0.55 * n)])
    masks = ops.select(weights, *args)
    assert_masks(weights, *args, masks)
    assert bool(masks[0][-1000:].all())


def test_pruning_of_one_tensor_of_2_to_the_31(threads) -> None:
    needs(9)
    threads(2)
    block = 1 << 24
    w = weights_of(OVER)
    ops.prune_([w], [0], [0], [OVER // 3])
    first = weights_of(block + 1000)[:block]  # every full block is the same but for ties at the cut
    assert int(sum(part.count_nonzero() for part in w.split(block))) == OVER // 3
    whole = [part for part in w[:-1000].split(block) if part.numel() == block]
    cut = min(part[part != 0].abs().min() for part in (whole[0], whole[-1]))
    for part in whole:
        assert_pruned([first], [part != 0], [part])
        assert bool((part[first.abs() > cut] != 0).all())
        assert int(part[first.abs() < cut].count_nonzero()) == 0
    ties = torch.cat([part[first.abs() == cut] != 0 for part in whole]).to(torch.int8)
    assert bool((ties[1:] <= ties[:-1]).all())  # the first are kept
    assert bool((w[-1000:] == 50).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_2_to_the_31_in_total(dtype: torch.dtype, threads) -> None:
    needs(3.5)
    threads(2)
    w = weights_of((1 << 27) + 3, dtype)  # read seventeen times over
    weights = [w] * 17 + [weights_of(1 << 20, dtype) * 3]
    layers = [0] * 17 + [1]
    n = sum(t.numel() for t in weights)
    assert n > OVER
    args = (layers, [0] * 18, [n - round(0.55 * n)])
    masks = ops.select(weights, *args)
    for i in range(1, 16):  # tensors that hold no tie in part
        if torch.equal(masks[i], masks[0]):
            masks[i] = masks[0]
    assert_masks(weights, *args, masks)


def test_scores_of_one_tensor_of_2_to_the_31(threads) -> None:
    needs(13.5)
    threads(2)
    w = weights_of(OVER)
    scores = ops.score([w], [0])
    assert_scores16([w], scores)


def test_scores_of_2_to_the_31_in_total(threads) -> None:
    needs(10)
    threads(2)
    w = weights_of((1 << 27) + 3)
    scores = ops.score([w] * 17, [0] * 17)
    assert_scores16([w], scores[:1], times=17)
    assert all(torch.equal(s, scores[0]) for s in scores)
