"""survey, solve and emit: any split of the weights gives the masks of the whole."""

from __future__ import annotations

import pytest
import torch
from dimap import ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import run_in_pieces
from problems import DTYPES, Problem, problems, values


@given(
    problem=problems(),
    cuts_at=st.lists(st.integers(0, 10**6), max_size=3),
    bins=st.sampled_from([256, 4096]),
)
@settings(max_examples=80, deadline=None)
def test_any_split(device: str, problem: Problem, cuts_at: list[int], bins: int) -> None:
    got = run_in_pieces(problem, cuts_at, bins, device)
    for mask, want in zip(got, reference.select(*problem.args()), strict=True):
        assert torch.equal(mask, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_tensors_in_pieces(dtype: torch.dtype, device: str) -> None:
    weights = [
        values("normal", 300_000, 0).to(dtype),
        values("cauchy", 100_000, 1).clamp(-6e4, 6e4).to(dtype),
    ]
    problem = Problem(weights, [0, 1], [0, 0], [170_000])
    got = run_in_pieces(problem, [7, 131_072, 200_001], 4096, device)
    assert all(torch.equal(a, b) for a, b in zip(got, ops.select(*problem.args()), strict=True))


def test_survey_of_nothing_is_zero(device: str) -> None:
    windows = ops.first_windows([torch.float32], 256).to(device)
    assert not ops.survey([], [], windows, 256).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [0x7F800000, 0x7F810000, 0x7FFF0000])
def test_a_window_beyond_all_finite_magnitudes(base, dtype, device) -> None:
    """No weight lies in it or above it, and nothing is written outside of the bins."""
    granularity = int(ops.first_windows([dtype], 256)[0, 2])
    windows = torch.tensor([[base, 16, granularity, *ops.NOTHING_KNOWN]], device=device)
    weights = torch.randn(70_000, device=device).to(dtype)
    table = ops.survey([weights], [0], windows, 256).cpu()
    assert int(table[0, 0]) == 70_000
    assert not table[0, 1:].any()


@pytest.mark.parametrize(
    ("windows", "bins", "message"),
    [
        (ops.first_windows([torch.float32], 256), 100, "bins must be at least 256, got 100"),
        (torch.tensor([[1, 23, 0, *ops.NOTHING_KNOWN]]), 256, r"windows\[0\] must start at a key"),
        (torch.tensor([[0, 24, 0, *ops.NOTHING_KNOWN]]), 256, r"windows\[0\] must start at a key"),
        (torch.zeros(1, 3, dtype=torch.int64), 256, "windows must have 7 columns, got 3"),
        (torch.zeros(1, 7), 256, "windows must be an int64 matrix on .*, got float32"),
        (
            torch.tensor([[0, 23, 16, *ops.NOTHING_KNOWN]]),
            256,
            r"granularity of at most 0 for weights\[0\]",
        ),
    ],
)
def test_bad_windows(windows: torch.Tensor, bins: int, message: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.survey([torch.ones(3, device=device)], [0], windows.to(device), bins)


def test_emit_refuses_undecided_cuts(device: str) -> None:
    weight, cuts, quota = torch.ones(3), torch.tensor([[-1, -1]]), torch.tensor([0])
    with pytest.raises(RuntimeError, match=r"cuts\[0\] must be decided"):
        ops.emit([weight.to(device)], [0], [0], cuts.to(device), quota.to(device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_survey_names_a_weight_that_is_not_finite(value: float, device: str) -> None:
    weights = [torch.ones(3, device=device), torch.tensor([1.0, value], device=device)]
    windows = ops.first_windows([torch.float32] * 2, 256).to(device)
    with pytest.raises(
        RuntimeError, match=rf"weights\[1\] must be finite, got {value} at flat index 1"
    ):
        ops.survey(weights, [0, 1], windows, 256)
