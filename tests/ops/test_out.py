"""Outputs at hand: the same values as new ones, where they were asked for, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from dimap import ops
from problems import DTYPES
from torch import Tensor

CALLS = {
    "score": (lambda w, out: ops.score(w, list(range(len(w))), out=out), torch.float32),
    "select": (
        lambda w, out: ops.select(
            w, list(range(len(w))), [0] * len(w), [sum(x.numel() for x in w) // 3], out=out
        ),
        torch.bool,
    ),
}


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def job(request):
    return request.param


def weights_of(dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((300, 257), (0,), (), (70_001,))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_as_new_ones(job, dtype, device) -> None:
    call, kind = job
    weights = weights_of(dtype, device)
    out = [torch.full_like(w, 7).to(kind) for w in weights]
    pointers, versions = [o.data_ptr() for o in out], [o._version for o in out]
    returned = call(weights, out)
    for got, mine, want in zip(returned, out, call(weights, None), strict=True):
        assert got is mine
        assert torch.equal(got, want)
    assert [o.data_ptr() for o in out] == pointers
    assert all(o._version > v for o, v in zip(out, versions, strict=True))


def test_weights_that_are_not_contiguous(job) -> None:
    call, kind = job
    weights = [torch.randn(40, 50).t(), torch.randn(9, 9)[::2]]
    out = [torch.empty(w.shape, dtype=kind) for w in weights]
    for got, want in zip(call(weights, out), call(weights, None), strict=True):
        assert torch.equal(got, want)


def test_nothing_into_nothing(job) -> None:
    call, _ = job
    assert call([], []) == []


def test_outputs_that_do_not_serve(job) -> None:
    call, kind = job
    weights = [torch.randn(6), torch.randn(2, 3)]

    def like(*shapes) -> list[Tensor]:
        return [torch.zeros(s, dtype=kind) for s in shapes]

    block = torch.zeros(9, dtype=kind)
    for out, message in (
        (like(6), r"out must have one entry for each of the 2 weights, got 1"),
        ([like(6)[0], torch.zeros(2, 3, dtype=torch.int32)], r"out\[1\] must be \w+, got int32"),
        (like(6, (3, 2)), r"out\[1\] must have the shape of weights\[1\]"),
        ([like(6)[0], like((3, 2))[0].t()], r"out\[1\] must be contiguous"),
        ([like(6)[0], torch.zeros(2, 3, dtype=kind, device="meta")], r"out\[1\] must be on cpu"),
        ([block[:6], block[3:].view(2, 3)], r"must not share memory with out\["),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(weights, out)
        assert all(not o.any() for o in out if o.device.type == "cpu")


def test_outputs_in_the_memory_of_weights(job) -> None:
    call, kind = job
    w = torch.randn(64)
    before = w.clone()
    with pytest.raises(RuntimeError, match=r"must not share memory with"):
        call([w, torch.randn(3)], [w.view(kind)[:64], torch.empty(3, dtype=kind)])
    assert torch.equal(w, before)


def test_outputs_in_the_memory_of_weights_that_are_views(job) -> None:
    """What is read is a copy of such a weight; its own memory is not to be written all the same."""
    call, kind = job
    w = torch.randn(8, 8)
    before = w.clone()
    with pytest.raises(RuntimeError, match=r"must not share memory with"):
        call([w.t()], [w.view(kind).flatten()[:64].view(8, 8)])
    with pytest.raises(RuntimeError, match=r"must not share memory with"):
        call([w[:, ::2]], [w.view(kind)[4:].flatten()[:32].view(8, 4)])
    assert torch.equal(w, before)


def test_outputs_of_backends_without_a_kernel_for_them() -> None:
    """Other backends than the CPU write the results there; the same places are refused."""
    kernel = torch.ops.dimap.score.out._op_dk
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    weights = [torch.randn(6), torch.randn(2, 3).t()]
    out = [torch.empty(6), torch.empty(3, 2)]
    kernel(key, weights, [0, 1], out=out)
    for got, want in zip(out, ops.score(weights, [0, 1]), strict=True):
        assert torch.equal(got, want)
    block = torch.zeros(9)
    for places, message in (
        ([block[:6], block[3:].view(3, 2)], r"out\[1\] must not share memory with out\[0\]"),
        ([weights[0], out[1]], r"weights\[0\] must not share memory with out\[0\]"),
        ([out[0], weights[1]], r"weights\[1\] must not share memory with out\[1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel(key, weights, [0, 1], out=places)
