"""The CUDA operators, kernels and all, on an emulated device against the specification."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import cuda_emulator
import pytest
import torch
from dimap import ops, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import assert_same_bits, assert_scores, check, run_in_pieces
from problems import DTYPES, KINDS, Problem, cast, problems, values

dimap_cpu = torch.ops.dimap
pytestmark = pytest.mark.skipif(
    cuda_emulator.COMPILER is None or platform.system() != "Linux", reason="needs a C++ compiler"
)


WAYS = {"source": (False, False), "ptx": (True, False), "ptx, preempted": (True, True)}


@pytest.fixture(scope="module")
def library() -> cuda_emulator.Emulated:
    library = cuda_emulator.build()
    torch.ops.load_library(str(library.path))
    return library


@pytest.fixture(
    scope="module",
    params=["source", "ptx", pytest.param("ptx, preempted", marks=pytest.mark.large)],
)
def way(request: pytest.FixtureRequest) -> str:
    """The kernels' sources for the host, the PTX that nvcc makes of them, and that with threads that interrupt one another."""
    if request.param != "source" and cuda_emulator.NVCC is None:
        pytest.skip("needs nvcc")
    return str(request.param)


@pytest.fixture(autouse=True)
def emulated(
    request: pytest.FixtureRequest, library: cuda_emulator.Emulated, way: str
) -> Iterator[cuda_emulator.Emulated]:
    """Put the emulated operators in the place of all others, and something in fresh memory."""
    if (
        way == "ptx, preempted"
        and request.node.originalname == "test_each_kind_over_several_chunks"
    ):
        pytest.skip("takes long: test_any_problem draws the kinds")
    library.run_ptx(*WAYS[way])
    torch.ops.dimap = torch.ops.dimap_emulated
    torch.use_deterministic_algorithms(True)  # fills what is allocated
    yield library
    torch.use_deterministic_algorithms(False)
    torch.ops.dimap = dimap_cpu
    assert library.found() == []


@given(problem=problems())
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_problem(problem: Problem) -> None:
    check(problem, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_over_several_chunks(kind: str, dtype: torch.dtype) -> None:
    weights = [cast(values(kind, n, n), dtype) for n in (20_001, 4_000, 11_111)]
    check(Problem(weights, [0, 1, 2], [0, 0, 1], [11_000, 500]), "cpu")


# In order, what is set aside overruns the slots of a few chunks; equal weights overrun a block's bins.
@pytest.mark.parametrize("kind", ["sorted", "equal", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors(kind: str, dtype: torch.dtype) -> None:
    problem = Problem([cast(values(kind, 250_000, 1), dtype)], [0], [0], [110_000])
    masks = ops.select(*problem.args())
    assert torch.equal(masks[0], dimap_cpu.select(*problem.args())[0])
    pruned = [problem.weights[0].clone()]
    ops.prune_(pruned, *problem.args()[1:])
    assert torch.equal(pruned[0], problem.weights[0] * masks[0])


def test_layers_of_very_different_scales() -> None:
    weights = [
        cast(values("normal", 5_000, s) * 10.0 ** (-38 + 10 * s), torch.float32) for s in range(8)
    ]
    check(Problem(weights, list(range(8)), [0] * 8, [15_000]), "cpu")


def test_layers_of_several_tensors_and_types() -> None:
    weights = [cast(values("normal", 5_000 + i, i), DTYPES[i % 3]) for i in range(9)]
    layers, modules = [0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 0, 0, 1, 0]
    check(Problem(weights, layers, modules, [9_000, 7_000]), "cpu")


def test_thousands_of_tensors() -> None:
    count = 2100  # more than blocks of a launch
    weights = [values("normal", 1 + n % 7, n).float() for n in range(count)]
    problem = Problem(weights, [i % 25 for i in range(count)], [0] * count, [2 * count])
    want = dimap_cpu.select(*problem.args())
    assert all(torch.equal(a, b) for a, b in zip(ops.select(*problem.args()), want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (3, 8), (8, 16), (3, 5), (0, 4)], ids=str)
def test_groups(pattern: tuple[int, int], dtype: torch.dtype, way: str) -> None:
    n, m = pattern
    for kind in (
        ("normal",) if way == "ptx, preempted" else ("normal", "small integers", "denormals")
    ):
        w = cast(values(kind, 5 * 7 * 8 * m + 3, m), dtype)
        odd = w[3:].reshape(
            7 * 8 * m, 5
        )  # begins at no multiple of 16 bytes; and what comes after it is not touched
        weights = [w[:-3].reshape(5, 7 * 8 * m), odd.t().contiguous(), w[: 3 * m].reshape(3, m)]
        assert_groups(weights, n, m, -1)
        assert_groups([odd, w[: m * 40].reshape(m, 40), odd[:0], odd[:m].clone()], n, m, 0)


def test_groups_of_more_than_a_piece() -> None:
    weights = [cast(values("small integers", 4 * 5000, 1), t).reshape(50, 400) for t in DTYPES]
    assert_groups(weights, 2, 4, -1)
    assert_groups([w.reshape(4, 5000) for w in weights], 1, 4, 0)


def assert_groups(weights: list[torch.Tensor], n: int, m: int, dim: int) -> None:
    masks = torch.ops.dimap.select_nm(weights, n, m, dim)
    # Every other one begins at an odd element, which no vector may touch.
    pruned = [
        torch.cat([w.new_zeros(i % 2), w.flatten()])[i % 2 :].view(w.shape)
        for i, w in enumerate(weights)
    ]
    torch.ops.dimap.nm_(pruned, n, m, dim)
    want = reference.select_nm(weights, n, m, dim)
    for w, mask, expected, p in zip(weights, masks, want, pruned, strict=True):
        assert torch.equal(mask, expected)
        assert_same_bits(p, torch.where(expected, w, torch.zeros_like(w)))


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_that_are_not_finite(bad: float, dtype: torch.dtype) -> None:
    weights = [torch.ones(8, 12).to(dtype), torch.full((40, 300), torch.finfo(dtype).max).to(dtype)]
    assert_groups(weights, 2, 4, -1)
    weights[1][39, 299] = bad
    before = [w.clone() for w in weights]
    torch.ops.dimap.nm_(weights, 2, 4, -1)
    for w, b in zip(weights, before, strict=True):
        assert torch.equal(w.view(torch.uint8), b.view(torch.uint8))
    assert not any(bool(mask.any()) for mask in torch.ops.dimap.select_nm(weights, 2, 4, -1))


def test_the_host_neither_waits_nor_lends_memory(emulated: cuda_emulator.Emulated) -> None:
    """A graph can replay what only launches kernels and copies on the device."""
    weights = [cast(values("normal", 9_000, i), dtype) for i, dtype in enumerate(DTYPES)]
    problem = Problem(weights, [0, 1, 2], [0, 0, 0], [11_000])
    before = emulated.host_calls
    torch.ops.dimap.select_cuts(*problem.args())
    torch.ops.dimap.score(weights, [0, 1, 2])
    torch.ops.dimap.prune_(*problem.args())
    torch.ops.dimap.apply_(weights, [w > 0 for w in weights])
    torch.ops.dimap.select_nm(weights, 2, 4, 0)
    torch.ops.dimap.nm_(weights, 3, 5, -1)
    assert emulated.host_calls == before
    ops.survey(weights, [0, 1, 2], ops.first_windows(DTYPES, 256), 256)
    assert emulated.host_calls > before  # the counter counts


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_start_between_vectors(dtype: torch.dtype, offset: int) -> None:
    weights = [cast(values("normal", 20_000 + offset, 1), dtype)[offset:]]
    check(Problem(weights, [0], [0], [9_000]), "cpu")


def test_weights_that_are_not_contiguous() -> None:
    base = values("normal", 6_000, 3).float().reshape(20, 300)
    check(Problem([base[::2, 1::3], base.t()], [0, 1], [0, 0], [3_000]), "cpu")


def test_weights_written_in_place_that_are_not_contiguous() -> None:
    before = values("normal", 6_000, 3).float().reshape(20, 300)
    weight, masks = before.clone()[::2, 1::3], [before[::2, 1::3] > 0]
    ops.apply_([weight], masks)
    assert torch.equal(weight, before[::2, 1::3] * masks[0])


@pytest.mark.parametrize("call", ["prune_", "apply_"])
def test_tensors_that_overlap_themselves_are_refused_before_any_change(call: str) -> None:
    first, base = torch.randn(100), torch.randn(1, 50)
    before, base_before = first.clone(), base.clone()
    weights = [first, base.expand(3, 50)]
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    arguments = ([0, 1], [0, 0], [10]) if call == "prune_" else (masks,)
    with pytest.raises(RuntimeError, match=r"weights\[1\] must not overlap itself"):
        getattr(torch.ops.dimap, call)(weights, *arguments)
    assert torch.equal(first, before)
    assert torch.equal(base, base_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nothing_is_changed_where_a_weight_is_not_finite(dtype: torch.dtype, value: float) -> None:
    weights = [values("normal", n, n).to(dtype) for n in (5_000, 40_000)]
    weights[1][39_999] = value
    before = [w.clone() for w in weights]
    torch.ops.dimap.prune_(weights, [0, 1], [0, 0], [30_000])
    for w, b in zip(weights, before, strict=True):
        assert torch.equal(w.view(torch.uint8), b.view(torch.uint8))
    masks, thresholds = torch.ops.dimap.select_cuts(weights, [0, 1], [0, 0], [30_000])
    assert thresholds.tolist() == [-1.0]
    assert not any(bool(m.any()) for m in masks)
    assert all(bool(s.isnan().all()) for s in torch.ops.dimap.score(weights, [0, 1]))


@given(problem=problems())
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_stages_in_pieces(problem: Problem) -> None:
    got = run_in_pieces(problem, [7, 300], 4096, "cpu")
    for mask, want in zip(got, reference.select(*problem.args()), strict=True):
        assert torch.equal(mask, want)


def sums(table: torch.Tensor) -> list[list[int]]:
    """A table's numbers, however they are split into words."""
    rows = []
    for total, above, *words in table.tolist():
        energy = sum(word << (32 * i) for i, word in enumerate(words[:20]))
        bins = words[20:]
        inside = [low + (high << 24) for low, high in zip(bins[1::3], bins[2::3], strict=True)]
        rows.append([total, above, energy, *bins[::3], *inside])
    return rows


def test_tables_equal_the_cpus() -> None:
    weights = [cast(values("huge and tiny", 5_000, i), dtype) for i, dtype in enumerate(DTYPES)]
    windows = ops.first_windows(DTYPES, 3000)
    args = (weights, [0, 1, 2], windows, 3000)
    assert sums(ops.survey(*args)) == sums(dimap_cpu.survey(*args))
    windows[:, 0] += 3 << 23  # with weights above and below
    assert sums(ops.survey(*args)) == sums(dimap_cpu.survey(*args))
    weights[1][17] = float("nan")
    with pytest.raises(
        RuntimeError, match=r"weights\[1\] must be finite, got nan at flat index 17"
    ):
        ops.survey(*args)


def test_a_few_large_weights_above_many_small_ones() -> None:
    """What lies above a bucket is exact, however much lies in the bins beside it."""
    few, many = values("normal", 3, 1) * 2.0**-3 + 1.0, torch.full((60_000,), 1.0 - 2.0**-6)
    weights = [torch.cat([few, many.double()]).float()]
    for got, want in zip(ops.score(weights, [0]), reference.score64(weights, [0]), strict=True):
        assert_scores(got, want)


@given(
    problem=problems(),
    bins=st.sampled_from([256, 701, 3000]),
    key=st.integers(0, 0x7F7FFFFF),
    shift=st.integers(0, 23),
)
@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_solve_equals_the_cpus(problem: Problem, bins: int, key: int, shift: int) -> None:
    """To the last bit: cuts, quotas, thresholds and the next windows, from a first window anywhere."""
    count = max(problem.layers) + 1
    module_of = [0] * count
    for layer, module in zip(problem.layers, problem.modules, strict=True):
        module_of[layer] = module
    windows = ops.first_windows([torch.float32] * count, bins)
    windows[:, 0], windows[:, 1] = key >> shift << shift, shift
    for _ in range(30):
        table = dimap_cpu.survey([], [], windows, bins)
        for w, layer in zip(problem.weights, problem.layers, strict=True):
            table += dimap_cpu.survey([w], [layer], windows, bins)
        before = table.clone()
        got = ops.solve(table, windows, module_of, problem.keep)
        want = dimap_cpu.solve(table, windows, module_of, problem.keep)
        assert torch.equal(table, before)
        assert all(
            torch.equal(a.view(torch.int64), b.view(torch.int64))
            for a, b in zip(got, want, strict=True)
        )
        cuts, quota, thresholds, windows = got
        if (quota >= 0).all():
            break
    else:
        raise AssertionError("not decided in thirty surveys")
    wanted = dimap_cpu.select_cuts(*problem.args())[1]
    torch.testing.assert_close(thresholds, wanted, rtol=0, atol=0, equal_nan=True)
    kept = [ops.emit([w], [i], [m], cuts, quota * 0)[0][0] for w, i, m in zip(problem.weights, problem.layers, problem.modules, strict=True)]  # fmt: skip
    for module, keep in enumerate(problem.keep):
        mine = sum(int(k.sum()) for k, m in zip(kept, problem.modules, strict=True) if m == module)
        assert mine + int(quota[module]) == keep


def test_stages_tell_the_host_a_word_each(emulated: cuda_emulator.Emulated) -> None:
    weights = [cast(values("normal", 3_000, i), dtype) for i, dtype in enumerate(DTYPES)]
    windows, quota, calls = ops.first_windows(DTYPES, 256), torch.tensor([-1]), 0
    before = emulated.host_bytes
    while (quota < 0).any():
        table = ops.survey(weights, [0, 1, 2], windows, 256)
        cuts, quota, _, windows = ops.solve(table, windows, [0, 0, 0], [4_000])
        calls += 2
    ops.emit(weights, [0, 1, 2], [0, 0, 0], cuts, quota)
    assert emulated.host_bytes - before == 4 * (calls + 1)


@pytest.mark.parametrize(
    "rows",
    [[1, 23], [0, 24], [-8, 3], [0, 0, 24], [0, 0, 0, -1], [0, 0, 0, 0, 1 << 32], [0, 0, 0, 0, 0, -1]],
    ids=str,
)  # fmt: skip
def test_windows_are_refused_as_on_the_cpu(rows: list[int]) -> None:
    windows = ops.first_windows([torch.float32] * 3, 256)
    table = dimap_cpu.survey([torch.ones(9)], [1], windows, 256)
    windows[1, : len(rows)] = torch.tensor(rows)
    for call, args in (
        ("survey", ([torch.ones(9)], [1], windows, 256)),
        ("solve", (table, windows, [0, 0, 0], [4])),
    ):
        with pytest.raises(RuntimeError, match=r"windows\[1\] must") as want:
            getattr(dimap_cpu, call)(*args)
        with pytest.raises(RuntimeError) as got:
            getattr(torch.ops.dimap, call)(*args)
        assert str(got.value) == str(want.value)


def test_keep_and_cuts_are_refused_as_on_the_cpu() -> None:
    windows = ops.first_windows([torch.float32] * 2, 256)
    weights = [torch.ones(9), torch.ones(5)]
    table = dimap_cpu.survey(weights, [0, 1], windows, 256)
    for keep in ([0, 6], [-1, 0]):
        with pytest.raises(RuntimeError, match=r"keep\[\d\] must be in \[0, [59]\], got"):
            ops.solve(table, windows, [0, 1], keep)
    cuts = torch.tensor([[5, 4], [5, 5]])
    with pytest.raises(RuntimeError, match=r"cuts\[1\] must be decided: .* got 5 and 5"):
        ops.emit(weights, [0, 1], [0, 1], cuts, torch.tensor([0, 0]))


def test_sums_far_above_a_window_are_exact_beyond_64_bits() -> None:
    windows = ops.first_windows([torch.float32], 256)
    windows[0, :2] = torch.tensor([1 << 23, 16])
    weights = [torch.full((270_000,), 2.0 - 2.0**-23)]
    args = (weights, [0], windows, 256)
    assert sums(ops.survey(*args)) == sums(dimap_cpu.survey(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_by_tables_where_shared_memory_is_small(
    dtype: torch.dtype, emulated: cuda_emulator.Emulated
) -> None:
    weights = [cast(values("normal", n, n), dtype) for n in (3_000, 2_001, 1_500)]
    want = ops.score(weights, [0, 1, 0])
    emulated.give_shared(48 << 10)
    try:
        got = ops.score(weights, [0, 1, 0])
    finally:
        emulated.give_shared(1 << 17)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_scores_are_the_same_in_every_run() -> None:
    weights = [cast(values("cauchy", 40_000, 1), dtype) for dtype in DTYPES]
    first, second = ops.score(weights, [0, 1, 2]), ops.score(weights, [0, 1, 2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
