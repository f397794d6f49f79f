"""What in-place operators write: nothing before all is known to be writable, and no other tensor."""

from __future__ import annotations

import pytest
import torch
from dimap import ops

WRITERS = {
    "prune_": lambda weights: ops.prune_(
        weights, list(range(len(weights))), [0] * len(weights), [4]
    ),
    "apply_": lambda weights: ops.apply_(
        weights, [torch.zeros(w.shape, dtype=torch.bool) for w in weights]
    ),
}
RAW = {
    "prune_": lambda w: torch.ops.dimap.prune_([w], [0], [0], [2]),
    "apply_": lambda w: torch.ops.dimap.apply_([w], [torch.zeros(w.shape, dtype=torch.bool)]),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(
    "overlapping",
    [torch.ones(1, 4).expand(3, 4), torch.arange(1.0, 6.0).as_strided((3, 3), (1, 1))],
    ids=["expanded", "strided"],
)
def test_tensor_that_overlaps_itself(write, overlapping) -> None:
    first = torch.arange(1.0, 9.0)
    with pytest.raises(RuntimeError, match=r"weights\[1\] must not overlap itself"):
        write([first, overlapping])
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_views_that_do_not_overlap_themselves(write) -> None:
    base = torch.arange(1.0, 49.0).reshape(2, 4, 6)
    views = [base[:, 1:3, ::4], base[1].t()[3:4], base[:1, 3:4].expand(1, 1, 6).permute(2, 0, 1)]
    write(views)
    assert sum(int(v.count_nonzero()) for v in views) <= 4
    assert int(base.count_nonzero()) >= 48 - sum(v.numel() for v in views)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_inference_tensor_that_is_not_contiguous(write) -> None:
    with torch.inference_mode():
        frozen = torch.arange(1.0, 11.0).view(2, 5).t()
    first = torch.arange(1.0, 9.0)
    with pytest.raises(RuntimeError, match="inference tensor"):
        write([first, frozen])
    assert first.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    with torch.inference_mode():
        write([frozen])
    assert int(frozen.count_nonzero()) <= 4


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_lazy_clone_leaves_its_origin(write) -> None:
    origin = torch.arange(1.0, 9.0)
    clone = torch._lazy_clone(origin)
    write([clone])
    assert origin.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert int(clone.count_nonzero()) <= 4


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_emptied_storage(write) -> None:
    weights = torch.ones(8)
    weights.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be in memory"):
        write([weights])


def test_mask_of_bytes_above_one() -> None:
    weights = torch.tensor([1 + 2.0**-23, 2.0, 3.0])
    mask = torch.tensor([128, 1, 0], dtype=torch.uint8).view(torch.bool)
    ops.apply_([weights], [mask])
    assert weights.tolist() == [1 + 2.0**-23, 2.0, 0.0]


@pytest.mark.parametrize("write", RAW.values(), ids=RAW)
@pytest.mark.parametrize("contiguous", [True, False])
def test_autograd_sees_that_a_saved_tensor_was_written(write, contiguous) -> None:
    weights = torch.arange(1.0, 7.0).view(2, 3)
    weights = (weights if contiguous else weights.t()).requires_grad_()
    loss = (weights * weights).sum()
    with torch.no_grad():
        write(weights)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
