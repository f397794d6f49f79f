"""The operators, documented: thin wrappers of ``torch.ops.dimap.*``.

All of them take `weights`, a sequence of float32, bfloat16 or float16 tensors on one device, and
number tensors into layers and modules: ``layers[i]`` is the layer of ``weights[i]``, ``modules[i]``
its module, ``keep[m]`` how many weights module ``m`` keeps. The squares of all tensors of a layer
are summed together; all layers of a module are ranked together.

The *score* of a weight (Eq. 10 of the DIMAP paper; the per-weight score of LAMP) is its square over
the sum of the squares of all weights of its layer that are at least as large:

    score64(w) = w² / S(w),    S(w) = Σ v² over the layer's v with |v| >= |w|

S is the exact sum rounded once to float64, so scores and masks do not depend on the order, the
sharding or the device of the weights, nor on the number of threads or the instruction set. None of
the operators is differentiable. All raise RuntimeError for a wrong dtype, a NaN or an infinity, a
count out of range or mixed devices; the message names the tensor, and every input is as it was.

>>> w = torch.tensor([3.0, -1.0, 2.0, 0.0, -2.0])
>>> score([w], [0])            # [1, 1/18, 4/17, 0, 4/17]
>>> select([w], [0], [0], [2])  # [True, False, True, False, False]: the tie goes to the lower index
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._dtypes import ENGINE_DTYPES

__all__ = [
    "apply_",
    "emit",
    "first_windows",
    "nm_",
    "pack",
    "prune_",
    "score",
    "select",
    "select_cuts",
    "select_nm",
    "solve",
    "survey",
    "unpack",
]


def score(
    weights: Sequence[Tensor], layers: Sequence[int], *, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return every weight's score.

    Returns float32 tensors with the shapes of `weights`: within 1 ulp of score64 rounded to
    float32, and the same in every run on the same device. Zero weights score 0, the largest
    magnitude of a layer 1.

    out: tensors to write and return instead of new ones, for callers who score again and again:
        float32, contiguous, of the weights' shapes and device, sharing no memory with them or each
        other. After an error it is undefined what is in them.
    """
    if not weights:
        return _library.check_out(weights, out or (), torch.float32)
    with torch.no_grad():
        if out is None:
            scores: list[Tensor] = torch.ops.dimap.score(weights, layers)
        else:
            scores = list(out)
            torch.ops.dimap.score.out(weights, layers, out=scores)
    if (
        weights
        and _looks(weights)
        and any(s.numel() and bool(s.flatten()[0].isnan()) for s in scores)
    ):
        _raise_non_finite(weights)
    return scores


def select(
    weights: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    keep: Sequence[int],
    *,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return bool masks, True where a weight is kept.

    Exactly ``keep[m]`` weights of module ``m`` are kept: those of highest score64. Ties go to the
    tensor earlier in the list, then to the lower flat index. Bit-identical on every backend.

    out: tensors to write and return instead of new ones, as in `score`, but bool.
    """
    if out is None:
        return select_cuts(weights, layers, modules, keep)[0]
    if weights and not _looks(weights):
        torch.ops.dimap.select.out(weights, layers, modules, keep, out=out)
        return list(out)
    # A device is asked how it went before anything is written.
    masks = _library.check_out(weights, out, torch.bool)
    for mask, found in zip(masks, select_cuts(weights, layers, modules, keep)[0], strict=True):
        mask.copy_(found)
    return masks


def select_cuts(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    """`select`, and each module's threshold: its smallest kept score64 (NaN where none is kept).

    Returns the masks and a float64 tensor of shape ``[len(keep)]``.
    """
    if not weights:
        return [], torch.full((len(keep),), float("nan"), dtype=torch.float64)
    masks, thresholds = torch.ops.dimap.select_cuts(weights, layers, modules, keep)
    if _looks(weights) and bool((thresholds < 0).any()):
        _raise_non_finite(weights)
    return masks, thresholds


def prune_(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> None:
    """Zero in place what `select` would drop. Kept weights keep their bits, dropped ones become +0."""
    if weights and _looks(weights):
        apply_(weights, select(weights, layers, modules, keep))
    elif weights:
        with torch.no_grad():
            torch.ops.dimap.prune_(weights, layers, modules, keep)


def _looks(weights: Sequence[Tensor]) -> bool:
    """Whether to ask a CUDA operator, which does not wait for the device, how it went.

    Not while a graph is captured or a program traced: there nothing can be asked. Nor of DTensors,
    whose parts are asked.
    """
    sharded = any(hasattr(w, "placements") for w in weights)
    if not weights[0].is_cuda or sharded or torch.compiler.is_compiling():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _raise_non_finite(weights: Sequence[Tensor]) -> None:
    """Raise what the CPU raises, or say that the device failed without a reason in the weights."""
    for i, w in enumerate(weights):
        bad = ~torch.isfinite(w).flatten()
        if bool(bad.any()):
            index = int(bad.int().argmax())
            got = float(w.detach().flatten()[index])
            raise RuntimeError(f"weights[{i}] must be finite, got {got} at flat index {index}")
    raise RuntimeError("the CUDA operator did not decide: please report this with the weights")


def apply_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero in place the weights whose mask is False. masks: bool, shapes of `weights`."""
    if weights:
        with torch.no_grad():
            torch.ops.dimap.apply_(weights, masks)


def select_nm(weights: Sequence[Tensor], n: int, m: int, dim: int = -1) -> list[Tensor]:
    """Return the bool masks of N:M: of every `m` weights in turn along `dim` the `n` largest.

    They are ranked by magnitude; of equal ones that of the lower index is kept, zeros last. So each
    group has exactly `n` True. m: from 2 to 16; n: from 0 to m. Every weight must have a multiple of
    `m` along `dim`, which may count from the end.
    """
    if not weights:
        return []
    with torch.no_grad():
        masks: list[Tensor] = torch.ops.dimap.select_nm(weights, n, m, dim)
    # A device that saw what is not finite says so by masks that keep nothing.
    if _looks(weights) and not all(
        bool(mask.any() if n else torch.isfinite(w).all())
        for w, mask in zip(weights, masks, strict=True)
        if w.numel()
    ):
        _raise_non_finite(weights)
    return masks


def nm_(weights: Sequence[Tensor], n: int, m: int, dim: int = -1) -> None:
    """Zero in place what `select_nm` would drop. Kept weights keep their bits, dropped ones become +0."""
    if weights and _looks(weights):
        apply_(weights, select_nm(weights, n, m, dim))
    elif weights:
        with torch.no_grad():
            torch.ops.dimap.nm_(weights, n, m, dim)


# The bounds of a window of whose surroundings nothing is known: keys below 2^31 and from 0 on; scores
# of at most 1 and at least 0, as the bits of float64.
NOTHING_KNOWN = (1 << 31, 0, 0x3FF0000000000000, 0)


DTYPES = {getattr(torch, dtype.name): dtype for dtype in ENGINE_DTYPES}  # that the operators take


def first_windows(dtypes: Sequence[torch.dtype], bins: int) -> Tensor:
    """The windows of a first `survey`: over all magnitudes, ``dtypes[l]`` being the type of layer l.

    For a layer of mixed types, name the one with the most digits: float32 before float16 before
    bfloat16. bins: at least 256; 4096 decides float32 layers in about three surveys.
    """
    rows = []
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise TypeError(f"dtypes must be float32, bfloat16 or float16, got {dtype}")
        zero_bits = DTYPES[dtype].zero_bits
        shift = max(zero_bits, min(23, 31 - (bins.bit_length() - 1)))
        rows.append([0, shift, zero_bits, *NOTHING_KNOWN])
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, _library.WINDOW_COLUMNS)


def survey(weights: Sequence[Tensor], layers: Sequence[int], windows: Tensor, bins: int) -> Tensor:
    """Stage 1: additive integer statistics of the weights, each layer seen through its window.

    `windows` is int64 ``[layers, 7]`` (`first_windows` makes the first ones): the first magnitude key
    of the window (a key is the bits of ``abs(w)`` as float32), log2 of the keys in one bin, how many
    low bits are zero in every key of the layer (float32: 0, bfloat16: 16, float16: 13), and four
    bounds that `solve` hands on. The result is int64 ``[layers, 22 + 3 * bins]``: the number of
    weights, the number and exact energy (20 words of 32 bits, unit 2^-298) of those above the window,
    then each bin's count and energy. The sum of two surveys through the same windows is the survey
    of the union: add shards and devices.
    """
    return torch.ops.dimap.survey(weights, layers, windows, bins)  # type: ignore[no-any-return]


def solve(
    table: Tensor, windows: Tensor, modules: Sequence[int], keep: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stage 2: each layer's magnitude cut from a survey; ``modules[l]`` is the module of layer l.

    Returns `cuts` int64 ``[layers, 2]`` (keys from the first on are kept; those equal to the second
    tie with the threshold), `quota` int64 ``[modules]`` (how many of the tied are kept; -1: not
    decided yet), `thresholds` float64 ``[modules]`` and the `windows` to survey next. Where a quota
    is -1 the module's cuts are -1: survey again through the returned windows.
    """
    return torch.ops.dimap.solve(table, windows, modules, keep)  # type: ignore[no-any-return]


def emit(
    weights: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    cuts: Tensor,
    quota: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Stage 3: the masks for decided cuts, and what is left of each module's quota.

    Give tensors in their order, in as many calls as you like, and hand the quota on.
    """
    return torch.ops.dimap.emit(weights, layers, modules, cuts, quota)  # type: ignore[no-any-return]


def pack(weights: Tensor) -> tuple[Tensor, Tensor]:
    """A sparse tensor as one bit a weight, and the nonzero values: a CPU tensor of the three types.

    Returns `bits`, uint8 ``[ceil(n / 8)]``: bit ``i % 8`` of byte ``i // 8``, from the least
    significant, is 1 where weight i of the flat tensor has any bit set, thus for a negative zero and
    a NaN too; and `values`, those weights in order. `unpack` gives the tensor back bit by bit.
    """
    with torch.no_grad():
        bits, values = torch.ops.dimap.pack(weights)
    return bits, values


def unpack(bits: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    """The tensor of shape `sizes` that `pack` made `bits` and `values` of.

    Raises RuntimeError where their lengths do not match the sizes or each other, or where an unused
    bit of the last byte is not 0.
    """
    with torch.no_grad():
        return torch.ops.dimap.unpack(bits, values, sizes)  # type: ignore[no-any-return]
