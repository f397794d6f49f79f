"""CUDA beside CPU: the same masks, scores within 1 ulp, nothing changed where weights are not finite."""

from __future__ import annotations

import pytest
import torch
from dimap import _library, ops

OPERATORS = [
    "apply_",
    "emit",
    "nm_",
    "prune_",
    "score",
    "select",
    "select_cuts",
    "select_nm",
    "solve",
    "survey",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0,), (1,), (19,), (111,), (7, 300), (3, 40000)]

built = pytest.mark.skipif(not _library.has_cuda, reason="built without CUDA, or torch has none")
gpu = pytest.mark.skipif(
    not (_library.has_cuda and torch.cuda.is_available()), reason="needs a CUDA device"
)


@built
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_registered_for_cuda(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dimap::{name}", "CUDA")


@built
def test_a_cuda_other_than_torchs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.warns(UserWarning, match=r"built with CUDA \d+ and torch with CUDA 11"):
        assert _library._load()


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a device")
def test_without_a_device_torch_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"NVIDIA|CUDA"):
        ops.select([torch.ones(3, device="cuda")], [0], [0], [1])


def _weights(dtype: torch.dtype, kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    if kind == "ties":
        weights = [w.mul(2).round() for w in weights]
    if kind == "zeros":
        weights = [w * (w.abs() > 0.7) for w in weights]
    if kind == "wide":
        weights = [
            torch.ldexp(w, torch.randint(-14, 14, w.shape, generator=generator)) for w in weights
        ]
    if kind == "equal":
        weights = [torch.full_like(w, -0.5) for w in weights]
    return [w.to(dtype) for w in weights]


LAYERS, MODULES = [0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1]


def _keep(weights: list[torch.Tensor], share: float) -> list[int]:
    totals = [0, 0]
    for w, m in zip(weights, MODULES, strict=True):
        totals[m] += w.numel()
    return [round(share * n) for n in totals]


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wide", "equal"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.45, 0.999, 1.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_masks_equal_the_cpus(dtype: torch.dtype, kind: str, share: float, offset: int) -> None:
    weights = _weights(dtype, kind)
    keep = _keep(weights, share)
    expected, thresholds = ops.select_cuts(weights, LAYERS, MODULES, keep)
    # offset 1: tensors that start at an odd element, which no vector load may touch
    there = [
        torch.cat([w.new_zeros(offset), w.flatten()]).cuda()[offset:].view(w.shape) for w in weights
    ]
    masks, found = ops.select_cuts(there, LAYERS, MODULES, keep)
    for mask, want in zip(masks, expected, strict=True):
        assert torch.equal(mask.cpu(), want)
    assert torch.equal(found.cpu().nan_to_num(-7), thresholds.nan_to_num(-7))
    ops.prune_(there, LAYERS, MODULES, keep)
    for w, want, before in zip(there, expected, weights, strict=True):
        assert torch.equal(w.cpu(), torch.where(want, before, torch.zeros_like(before)))


@gpu
def test_weights_that_are_not_contiguous() -> None:
    weight = torch.randn(300, 200)
    expected = ops.select([weight.t()], [0], [0], [1000])[0]
    there = weight.cuda().t()
    assert torch.equal(ops.select([there], [0], [0], [1000])[0].cpu(), expected)
    ops.prune_([there], [0], [0], [1000])
    assert torch.equal(there.cpu(), weight.t() * expected)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "wide"])
def test_scores_are_within_one_ulp_and_the_same_in_every_run(dtype: torch.dtype, kind: str) -> None:
    weights = _weights(dtype, kind)
    there = [w.cuda() for w in weights]
    first, second = ops.score(there, LAYERS), ops.score(there, LAYERS)
    for a, b, want in zip(first, second, ops.score(weights, LAYERS), strict=True):
        assert torch.equal(a, b)
        # Positive floats order as their bits do; the CPU's own score may be an ulp off, too.
        assert (
            not want.numel()
            or (a.cpu().view(torch.int32) - want.view(torch.int32)).abs().max() <= 2
        )


@gpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_operator_changes_nothing_where_a_weight_is_not_finite(value: float) -> None:
    weights = [torch.randn(5000, device="cuda"), torch.randn(70000, device="cuda")]
    weights[1][69999] = value
    before = [w.clone() for w in weights]
    torch.ops.dimap.prune_(weights, [0, 1], [0, 0], [30000])
    for w, b in zip(weights, before, strict=True):
        assert torch.equal(w.view(torch.int32), b.view(torch.int32))
    masks, thresholds = torch.ops.dimap.select_cuts(weights, [0, 1], [0, 0], [30000])
    assert thresholds.tolist() == [-1.0]
    assert not any(bool(m.any()) for m in masks)
    assert all(bool(s.isnan().all()) for s in torch.ops.dimap.score(weights, [0, 1]))


@gpu
def test_graph_replay_decides_anew() -> None:
    weight = torch.randn(200_000, device="cuda")
    torch.ops.dimap.select([weight], [0], [0], [50_000])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = torch.ops.dimap.select([weight], [0], [0], [50_000])
    for seed in range(3):
        weight.copy_(torch.randn(200_000, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(masks[0].cpu(), ops.select([weight.cpu()], [0], [0], [50_000])[0])
