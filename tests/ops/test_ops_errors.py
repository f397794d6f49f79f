"""Bad input: a clear error that names the tensor, and every input as it was."""

from __future__ import annotations

import math

import pytest
import torch
from dimap import ops

GOOD = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ops.score([w, w.double()], [0, 1]),
         r"weights\[1\] must be float32, bfloat16 or float16, got float64"),
        (lambda w: ops.select([w.int()], [0], [0], [1]),
         r"weights\[0\] must be float32, bfloat16 or float16, got int32"),
        (lambda w: ops.score([w], [0, 1]), r"layers must have one entry for each of the 1 weights, got 2"),
        (lambda w: ops.select([w], [0], [], [1]), r"modules must have one entry .* got 0"),
        (lambda w: ops.score([w], [-1]), r"layers\[0\] must be in \[0, 0\], got -1"),
        (lambda w: ops.score([w, w], [0, 2]), r"layers\[1\] must be in \[0, 1\], got 2"),
        (lambda w: ops.select([w], [0], [3], [1]), r"modules\[0\] must be in \[0, 0\], got 3"),
        (lambda w: ops.select([w], [0], [0], [4]), r"keep\[0\] must be in \[0, 3\], got 4"),
        (lambda w: ops.select([w], [0], [0], [-1]), r"keep\[0\] must be in \[0, 3\], got -1"),
        (lambda w: ops.select([w, w], [0, 0], [0, 1], [1, 1]),
         r"modules\[1\] must be 0 like modules\[0\], since both are of layer 0, got 1"),
        (lambda w: ops.apply_([w], [torch.ones_like(w)]), r"masks\[0\] must be bool, got float32"),
        (lambda w: ops.apply_([w], [torch.ones(4, dtype=torch.bool, device=w.device)]), r"masks\[0\] must have the shape"),
        (lambda w: ops.apply_([w], []), r"masks must have one entry"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message: str, device: str) -> None:
    good = GOOD.to(device)
    with pytest.raises(RuntimeError, match=message):
        call(good)
    assert good.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("bad", "said"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
@pytest.mark.parametrize("place", [0, 40, 99_999])
def test_non_finite_weights_are_named_and_nothing_is_changed(
    dtype, bad, said, place, device
) -> None:
    torch.manual_seed(0)
    good, w = torch.randn(1_000).to(dtype), torch.randn(100_000).to(dtype)
    good, w = good.to(device), w.to(device)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_and_masks_on_cpu_and_cuda() -> None:
    there = GOOD.cuda()
    for first, second in ((GOOD, there), (there, GOOD)):
        with pytest.raises(RuntimeError, match=r"weights\[1\] must be on .* like weights\[0\]"):
            ops.select([first, second], [0, 1], [0, 0], [1])
        with pytest.raises(RuntimeError, match=r"masks\[0\] must be on .* like weights\[0\]"):
            ops.apply_([first], [second > 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.select([torch.tensor([1.0])], [0], [0], [5]),
            "keep[0] must be in [0, 1], got 5",
        ),
        (
            lambda: ops.score([torch.tensor([1.0, -math.inf])], [0]),
            "weights[0] must be finite, got -inf at flat index 1",
        ),
    ],
)
def test_errors_are_the_sentence_alone(call, message):
    """No function, file and line of the source in front, which torch's own checks put there."""
    with pytest.raises(RuntimeError) as error:
        call()
    assert str(error.value) == message
