"""Load the operator libraries and register what the dispatcher needs besides kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import _C

_HERE = Path(__file__).resolve().parent
_HEAD = 22  # columns of a survey's table before its bins


def _find(stem: str) -> Path | None:
    """The shared library `stem`: beside this file, or where an editable install put it."""
    for folder in (_HERE, Path(_C.__file__).resolve().parent):
        found = sorted(folder.glob(f"lib{stem}.*"))
        if found:
            return found[0]
    return None


def _load() -> bool:
    """Load the operators, and the CUDA ones where torch has CUDA. Returns whether those are there."""
    operators = _find("dimap_ops")
    if operators is None:
        raise ImportError("dimap's operator library was not found beside dimap._C: reinstall dimap")
    torch.ops.load_library(str(operators))
    cuda = _find("dimap_cuda")
    if cuda is None or torch.version.cuda is None:
        return False
    torch.ops.load_library(str(cuda))
    return True


has_cuda = _load()


def _masks(weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=torch.bool, device=w.device) for w in weights]


def _check(weights: Sequence[Tensor], **numbers: Sequence[object]) -> None:
    """What the kernels check and a fake tensor can know."""
    for i, w in enumerate(weights):
        torch._check(
            w.device == weights[0].device,
            lambda i=i, w=w: (  # type: ignore[misc]
                f"weights[{i}] must be on {weights[0].device} like weights[0], got {w.device}"
            ),
        )
    for name, given in numbers.items():
        torch._check(
            len(given) == len(weights),
            lambda name=name, given=given: (  # type: ignore[misc]
                f"{name} must have one entry for each of the {len(weights)} weights, "
                f"got {len(given)}"
            ),
        )


@torch.library.register_fake("dimap::score")
def _(weights: Sequence[Tensor], layers: Sequence[int]) -> list[Tensor]:
    _check(weights, layers=layers)
    return [torch.empty(w.shape, dtype=torch.float32, device=w.device) for w in weights]


@torch.library.register_fake("dimap::select")
def _(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> list[Tensor]:
    _check(weights, layers=layers, modules=modules)
    return _masks(weights)


@torch.library.register_fake("dimap::select_cuts")
def _(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> tuple[list[Tensor], Tensor]:
    _check(weights, layers=layers, modules=modules)
    device = weights[0].device if weights else None
    return _masks(weights), torch.empty(len(keep), dtype=torch.float64, device=device)


@torch.library.register_fake("dimap::prune_")
def _(
    weights: Sequence[Tensor], layers: Sequence[int], modules: Sequence[int], keep: Sequence[int]
) -> None:
    _check(weights, layers=layers, modules=modules)


@torch.library.register_fake("dimap::apply_")
def _(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    _check(weights, masks=masks)


@torch.library.register_fake("dimap::survey")
def _(weights: Sequence[Tensor], layers: Sequence[int], windows: Tensor, bins: int) -> Tensor:
    _check(weights, layers=layers)
    return windows.new_empty((windows.shape[0], _HEAD + 3 * bins), dtype=torch.int64)


@torch.library.register_fake("dimap::solve")
def _(
    table: Tensor, windows: Tensor, modules: Sequence[int], keep: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = len(keep)
    return (
        table.new_empty((table.shape[0], 2)),
        table.new_empty((n,)),
        table.new_empty((n,), dtype=torch.float64),
        table.new_empty((table.shape[0], 7)),
    )


@torch.library.register_fake("dimap::emit")
def _(
    weights: Sequence[Tensor],
    layers: Sequence[int],
    modules: Sequence[int],
    cuts: Tensor,
    quota: Tensor,
) -> tuple[list[Tensor], Tensor]:
    _check(weights, layers=layers, modules=modules)
    return _masks(weights), torch.empty_like(quota)


@torch.library.register_fake("dimap::pack")
def _(weights: Tensor) -> tuple[Tensor, Tensor]:
    nonzero = torch.library.get_ctx().new_dynamic_size()
    bits = weights.new_empty(((weights.numel() + 7) // 8,), dtype=torch.uint8)
    return bits, weights.new_empty((nonzero,))


@torch.library.register_fake("dimap::unpack")
def _(bits: Tensor, values: Tensor, sizes: Sequence[int]) -> Tensor:
    return values.new_empty(list(sizes))


def _refuse_gradient(name: str) -> None:
    def backward(ctx: object, *grads: object) -> None:
        raise NotImplementedError(
            f"dimap::{name} is not differentiable: call it under torch.no_grad() or detach its result"
        )

    torch.library.register_autograd(f"dimap::{name}", backward)


_refuse_gradient("score")


_IN_PLACE = torch.library.Library("dimap", "IMPL")


def _count_writes(name: str) -> None:
    """Let autograd see that the operator writes its weights, as it sees of torch's own."""
    operator = getattr(torch.ops.dimap, name).default

    def kernel(keys: torch._C.DispatchKeySet, weights: Sequence[Tensor], *rest: object) -> None:
        torch.autograd.graph.increment_version(weights)
        operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, weights, *rest)

    _IN_PLACE.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


_count_writes("prune_")
_count_writes("apply_")
