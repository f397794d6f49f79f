"""Bad input: a clear error that names the tensor, and every input as it was."""

from __future__ import annotations

import pytest
import torch
from dimap import ops

GOOD = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.score([GOOD, GOOD.double()], [0, 1]),
         r"weights\[1\] must be float32, bfloat16 or float16, got float64"),
        (lambda: ops.select([GOOD.int()], [0], [0], [1]),
         r"weights\[0\] must be float32, bfloat16 or float16, got int32"),
        (lambda: ops.score([GOOD], [0, 1]), r"layers must have one entry for each of the 1 weights, got 2"),
        (lambda: ops.select([GOOD], [0], [], [1]), r"modules must have one entry .* got 0"),
        (lambda: ops.score([GOOD], [-1]), r"layers\[0\] must be in \[0, 0\], got -1"),
        (lambda: ops.score([GOOD, GOOD], [0, 2]), r"layers\[1\] must be in \[0, 1\], got 2"),
        (lambda: ops.select([GOOD], [0], [3], [1]), r"modules\[0\] must be in \[0, 0\], got 3"),
        (lambda: ops.select([GOOD], [0], [0], [4]), r"keep\[0\] must be in \[0, 3\], got 4"),
        (lambda: ops.select([GOOD], [0], [0], [-1]), r"keep\[0\] must be in \[0, 3\], got -1"),
        (lambda: ops.select([GOOD, GOOD], [0, 0], [0, 1], [1, 1]),
         r"modules\[1\] must be 0 like modules\[0\], since both are of layer 0, got 1"),
        (lambda: ops.apply_([GOOD], [torch.ones(3)]), r"masks\[0\] must be bool, got float32"),
        (lambda: ops.apply_([GOOD], [torch.ones(4, dtype=torch.bool)]), r"masks\[0\] must have the shape"),
        (lambda: ops.apply_([GOOD], []), r"masks must have one entry"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
    assert GOOD.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("bad", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "inf")]
)
@pytest.mark.parametrize("place", [0, 40, 99_999])
def test_non_finite_weights_are_named_and_nothing_is_changed(dtype, bad, said, place) -> None:
    torch.manual_seed(0)
    good, w = torch.randn(1_000).to(dtype), torch.randn(100_000).to(dtype)
    w[place] = bad
    before = [good.clone(), w.clone()]
    message = rf"weights\[1\] must be finite, got {said} at flat index {place}"
    args = ([good, w], [0, 1], [0, 0], [50_000])
    with pytest.raises(RuntimeError, match=message):
        ops.select(*args)
    with pytest.raises(RuntimeError, match=message):
        ops.prune_(*args)
    with pytest.raises(RuntimeError, match=message):
        ops.score(args[0], args[1])
    for a, b in zip(args[0], before, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_mixed_devices() -> None:
    with pytest.raises(
        RuntimeError, match=r"weights\[1\] must be on cpu like weights\[0\], got meta"
    ):
        ops.select([GOOD, GOOD.to("meta")], [0, 1], [0, 0], [1])
