"""select_nm and nm_ against the specification: any shape, dimension, pattern and values."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from dimap import _C, ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import assert_same_bits
from problems import DTYPES, KINDS, cast, values
from torch import Tensor

PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2), (8, 16), (5, 16), (3, 5), (7, 9), (0, 4), (4, 4)]


def check_nm(weights: list[Tensor], n: int, m: int, dim: int, device: str) -> None:
    want = reference.select_nm(weights, n, m, dim)
    there = [w.to(device) for w in weights]
    masks = ops.select_nm(there, n, m, dim)
    pruned = [w.clone() for w in there]
    ops.nm_(pruned, n, m, dim)
    for w, mask, expected, p in zip(weights, masks, want, pruned, strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask.cpu(), expected)
        groups = expected.movedim(dim, -1).unflatten(-1, (w.shape[dim] // m, m))
        assert bool((groups.sum(-1) == n).all())
        assert_same_bits(p, torch.where(expected, w, torch.zeros_like(w)))
    for a, b in zip(there, weights, strict=True):
        assert_same_bits(a, b)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[Tensor], int, int, int]:
    m = draw(st.integers(2, 16))
    n = draw(st.integers(0, m))
    dims = draw(st.integers(1, 3))
    dim = draw(st.integers(-dims, dims - 1))
    weights = []
    for _ in range(draw(st.integers(1, 3))):
        shape = [draw(st.sampled_from([0, 1, 2, 3, 7, 33, 65])) for _ in range(dims)]
        shape[dim] = m * draw(st.sampled_from([0, 1, 2, 3, 9]))
        count = torch.Size(shape).numel()
        x = values(draw(st.sampled_from(KINDS)), max(count, 2), draw(st.integers(0, 10**6)))
        w = cast(x[:count].reshape(shape), draw(st.sampled_from(DTYPES)))
        if dims > 1 and draw(st.booleans()):  # not contiguous
            w = w.transpose(0, -1).contiguous().transpose(0, -1)
        weights.append(w)
    return weights, n, m, dim


@given(problem=grouped())
@settings(max_examples=300, deadline=None)
def test_any_groups(device: str, problem: tuple[list[Tensor], int, int, int]) -> None:
    check_nm(*problem, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_each_pattern_over_several_pieces(
    pattern: tuple[int, int], dtype: torch.dtype, dim: int, device: str
) -> None:
    n, m = pattern
    for seed, kind in enumerate(["normal", "small integers", "zeros", "denormals"]):
        shape = [5, 61, 203] if dim == 0 else [5, 211, 203]
        shape[dim] = 13 * m
        w = cast(values(kind, torch.Size(shape).numel(), seed).reshape(shape), dtype)
        check_nm([w, w[:3].contiguous()] if dim else [w], n, m, dim, device)


def test_ties_go_to_the_lower_index_and_zeros_have_no_sign(device: str) -> None:
    w = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, -0.0, 0.0, 3.0]], device=device)
    [mask] = ops.select_nm([w], 2, 4)
    assert mask.tolist() == [[True, True, False, False], [True, False, False, True]]
    ops.nm_([w], 1, 4)
    assert w.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]]


def test_what_is_written_is_the_view(device: str) -> None:
    base = values("normal", 24 * 40, 3).float().reshape(24, 40).to(device)
    before = base.clone()
    view = base[::2, 4:20].t()
    [mask] = ops.select_nm([view], 2, 4, 0)
    ops.nm_([view], 2, 4, 0)
    before[::2, 4:20] *= mask.t()
    assert torch.equal(base, before)


def test_autograd_knows_that_weights_are_written(device: str) -> None:
    w = torch.randn(4, 8, device=device, requires_grad=True)
    y = (w * w).sum()
    ops.nm_([w.detach()], 2, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ops.select_nm([w], 5, 4), r"n must be in \[0, 4\], got 5"),
        (lambda w: ops.select_nm([w], -1, 4), r"n must be in \[0, 4\], got -1"),
        (lambda w: ops.select_nm([w], 1, 1), r"m must be in \[2, 16\], got 1"),
        (lambda w: ops.nm_([w], 1, 17), r"m must be in \[2, 16\], got 17"),
        (lambda w: ops.select_nm([w], 2, 4, 2), r"dim must be in \[-2, 1\] for weights\[0\] of 2 dim.* got 2"),
        (lambda w: ops.nm_([w], 2, 4, -3), r"dim must be in \[-2, 1\] for weights\[0\] of 2 dim.* got -3"),
        (lambda w: ops.select_nm([w, w[:, :6]], 2, 4),
         r"weights\[1\] must have a multiple of m, 4, along dim -1, got 6 of shape \(3, 6\)"),
        (lambda w: ops.nm_([w], 2, 4, 0), r"weights\[0\] must have a multiple of m, 4, along dim 0, got 3"),
        (lambda w: ops.select_nm([w, w.double()], 2, 4),
         r"weights\[1\] must be float32, bfloat16 or float16, got float64"),
        (lambda w: ops.nm_([w.int()], 2, 4), r"weights\[0\] must be float32, bfloat16 or float16, got int32"),
        (lambda w: ops.select_nm([w.sum()], 2, 4), r"weights\[0\] must have a dimension to group along"),
        (lambda w: ops.nm_([w, w[:1].expand(3, 8)], 2, 4), r"weights\[1\] must not overlap itself"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message: str, device: str) -> None:
    w = torch.arange(24.0, device=device).reshape(3, 8)
    before = w.clone()
    with pytest.raises(RuntimeError, match=message):
        call(w)
    assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bad", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
@pytest.mark.parametrize("place", [0, 40, 399_999])
@pytest.mark.parametrize("pattern", [(2, 4), (0, 8), (3, 5)])
def test_non_finite_weights_are_named_and_nothing_is_changed(
    pattern: tuple[int, int], place: int, bad: float, said: str, dtype: torch.dtype, device: str
) -> None:
    good = torch.linspace(-1, 1, 1_000).reshape(25, 40).to(dtype).to(device)
    w = torch.linspace(-1, 1, 400_000).reshape(1_000, 400).to(dtype).to(device)
    w.view(-1)[place] = bad
    before = [good.clone(), w.clone()]
    message = rf"weights\[1\] must be finite, got {said} at flat index {place}"
    for call in (ops.select_nm, ops.nm_):
        with pytest.raises(RuntimeError, match=message):
            call([good, w], *pattern)
    for a, b in zip([good, w], before, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_largest_finite_weights_are_finite(device: str) -> None:
    for dtype in DTYPES:
        w = torch.full((3, 16), torch.finfo(dtype).max, dtype=dtype)
        w[1] *= -1
        check_nm([w], 2, 4, -1, device)


def test_no_weights() -> None:
    assert ops.select_nm([], 2, 4) == []
    ops.nm_([], 2, 4)


SAME = """
import torch, dimap
g = torch.Generator().manual_seed(0)
for n, m in ((2, 4), (1, 2), (5, 8), (7, 16), (3, 7)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = (torch.randn(3, 6 * m, 77, generator=g) * 4).round().to(dtype)
        for dim, x in ((1, w), (-1, w.transpose(1, 2).contiguous())):
            [mask] = dimap.ops.select_nm([x], n, m, dim)
            assert torch.equal(mask, dimap.reference.select_nm([x], n, m, dim)[0]), (n, m, dtype, dim)
print(dimap.build_info()["instruction_set"])
"""


@pytest.mark.parametrize("isa", _C.build_info()["instruction_sets"])
def test_each_instruction_set(isa: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAME],
        env={**os.environ, "DIMAP_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(threads, count: int) -> None:
    w = values("small integers", 400_000, 1).float().reshape(400, 1000)
    threads(count)
    assert torch.equal(ops.select_nm([w], 2, 4)[0], reference.select_nm([w], 2, 4)[0])
