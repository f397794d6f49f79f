"""Load the operator libraries and register what the dispatcher needs besides kernels."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from . import _C

_Tensors: TypeAlias = Sequence[Tensor]
_Ints: TypeAlias = Sequence[int]
_HEAD = 22  # columns of a survey's table before its bins
WINDOW_COLUMNS = 7  # of a window's row (see `ops.survey`)


def _find(stem: str) -> Path | None:
    """The shared library `stem`: beside this file, or where an editable install put it."""
    folders = (Path(file).resolve().parent for file in (__file__, _C.__file__))
    return next((found for folder in folders for found in folder.glob(f"lib{stem}.*")), None)


def _load() -> bool:
    """Load the operators, and the CUDA ones where torch has CUDA. Returns whether those are there."""
    operators = _find("dimap_ops")
    if operators is None:
        raise ImportError("dimap's operator library was not found beside dimap._C: reinstall dimap")
    torch.ops.load_library(str(operators))
    cuda = _find("dimap_cuda")
    if cuda is None or torch.version.cuda is None:
        return False
    built, has = str(_C.build_info()["cuda"]).split(".")[0], torch.version.cuda.split(".")[0]
    if built != has:
        warnings.warn(
            f"dimap was built with CUDA {built} and torch with CUDA {has}: a driver that runs the one may "
            "not run the other. Build dimap with torch's CUDA, or set DIMAP_CUDA=OFF",
            stacklevel=2,
        )
    torch.ops.load_library(str(cuda))
    return True


has_cuda = _load()


def _check(weights: _Tensors, **numbers: Sequence[object]) -> None:
    """What the kernels check and a fake tensor can know."""
    for i, w in enumerate(weights):
        if w.device != weights[0].device:
            wanted = f"{weights[0].device} like weights[0]"
            raise RuntimeError(f"weights[{i}] must be on {wanted}, got {w.device}")
    for name, given in numbers.items():
        if len(given) != len(weights):
            wanted = f"one entry for each of the {len(weights)} weights"
            raise RuntimeError(f"{name} must have {wanted}, got {len(given)}")


def _like(weights: _Tensors, dtype: torch.dtype) -> list[Tensor]:
    return [torch.empty(w.shape, dtype=dtype, device=w.device) for w in weights]


@torch.library.register_fake("dimap::score")
def _(weights: _Tensors, layers: _Ints) -> list[Tensor]:
    _check(weights, layers=layers)
    return _like(weights, torch.float32)


@torch.library.register_fake("dimap::select")
def _(weights: _Tensors, layers: _Ints, modules: _Ints, keep: _Ints) -> list[Tensor]:
    _check(weights, layers=layers, modules=modules)
    return _like(weights, torch.bool)


@torch.library.register_fake("dimap::select_cuts")
def _(weights: _Tensors, layers: _Ints, modules: _Ints, keep: _Ints) -> tuple[list[Tensor], Tensor]:
    _check(weights, layers=layers, modules=modules)
    device = weights[0].device if weights else None
    return _like(weights, torch.bool), torch.empty(len(keep), dtype=torch.float64, device=device)


def check_out(weights: _Tensors, out: _Tensors, dtype: torch.dtype) -> list[Tensor]:
    """Return `out` where it serves for results of this dtype that are otherwise like the weights."""
    _check(weights, out=out)
    for i, (w, o) in enumerate(zip(weights, out, strict=True)):
        if o.dtype != dtype:
            wanted, got = (str(d).removeprefix("torch.") for d in (dtype, o.dtype))
            raise RuntimeError(f"out[{i}] must be {wanted}, got {got}")
        if o.device != w.device:
            raise RuntimeError(f"out[{i}] must be on {w.device} like weights[{i}], got {o.device}")
        if o.shape != w.shape:
            got = f"{tuple(w.shape)}, got {tuple(o.shape)}"
            raise RuntimeError(f"out[{i}] must have the shape of weights[{i}], {got}")
    return list(out)


@torch.library.register_fake("dimap::prune_")
def _(weights: _Tensors, layers: _Ints, modules: _Ints, keep: _Ints) -> None:
    _check(weights, layers=layers, modules=modules)


@torch.library.register_fake("dimap::apply_")
def _(weights: _Tensors, masks: _Tensors) -> None:
    _check(weights, masks=masks)


def _check_groups(weights: _Tensors, n: int, m: int, dim: int) -> None:
    _check(weights)
    if not 2 <= m <= 16:
        raise RuntimeError(f"m must be in [2, 16], got {m}")
    if not 0 <= n <= m:
        raise RuntimeError(f"n must be in [0, {m}], got {n}")
    for i, w in enumerate(weights):
        if not -w.dim() <= dim < w.dim():
            raise RuntimeError(f"dim must be one of the {w.dim()} of weights[{i}], got {dim}")
        if w.shape[dim] % m:
            wanted = f"a multiple of m, {m}, along dim {dim}"
            raise RuntimeError(f"weights[{i}] must have {wanted}, got {w.shape[dim]}")


@torch.library.register_fake("dimap::select_nm")
def _(weights: _Tensors, n: int, m: int, dim: int) -> list[Tensor]:
    _check_groups(weights, n, m, dim)
    return _like(weights, torch.bool)


@torch.library.register_fake("dimap::nm_")
def _(weights: _Tensors, n: int, m: int, dim: int) -> None:
    _check_groups(weights, n, m, dim)


@torch.library.register_fake("dimap::survey")
def _(weights: _Tensors, layers: _Ints, windows: Tensor, bins: int) -> Tensor:
    _check(weights, layers=layers)
    return windows.new_empty((windows.shape[0], _HEAD + 3 * bins), dtype=torch.int64)


@torch.library.register_fake("dimap::solve")
def _(table: Tensor, windows: Tensor, modules: _Ints, keep: _Ints) -> tuple[Tensor, ...]:
    quota = table.new_empty((len(keep),))
    cuts, closer = table.new_empty((len(table), 2)), table.new_empty((len(table), WINDOW_COLUMNS))
    return cuts, quota, torch.empty_like(quota, dtype=torch.float64), closer


@torch.library.register_fake("dimap::emit")
def _(
    weights: _Tensors, layers: _Ints, modules: _Ints, cuts: Tensor, quota: Tensor
) -> tuple[list[Tensor], Tensor]:
    _check(weights, layers=layers, modules=modules)
    return _like(weights, torch.bool), torch.empty_like(quota)


@torch.library.register_fake("dimap::pack")
def _(weights: Tensor) -> tuple[Tensor, Tensor]:
    nonzero = torch.library.get_ctx().new_dynamic_size()
    bits = weights.new_empty(((weights.numel() + 7) // 8,), dtype=torch.uint8)
    return bits, weights.new_empty((nonzero,))


@torch.library.register_fake("dimap::unpack")
def _(bits: Tensor, values: Tensor, sizes: _Ints) -> Tensor:
    return values.new_empty(list(sizes))


def _refuse_gradient(ctx: object, *gradients: object) -> None:
    raise NotImplementedError(
        "dimap::score is not differentiable: call it under torch.no_grad() or detach its result"
    )


torch.library.register_autograd("dimap::score", _refuse_gradient)

_IMPLEMENTATIONS = torch.library.Library("dimap", "IMPL")


def _check_apart(weights: _Tensors, out: _Tensors) -> None:
    """Raise where an output shares memory with a weight or another output."""

    def span(t: Tensor, name: str) -> tuple[int, int, str]:
        last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name

    spans = [span(t, f"out[{i}]") for i, t in enumerate(out) if t.numel()]
    spans += [span(t, f"weights[{i}]") for i, t in enumerate(weights) if t.numel()]
    furthest: dict[bool, tuple[int, str]] = {}  # where outputs end, and where weights do
    for begin, end, name in sorted(spans):
        output = name.startswith("out")
        for which in (True, False) if output else (True,):
            if which in furthest and furthest[which][0] > begin:
                raise RuntimeError(f"{name} must not share memory with {furthest[which][1]}")
        furthest[output] = max(furthest.get(output, (0, "")), (end, name))


def _add_out(name: str, dtype: torch.dtype) -> None:
    """Outputs that are at hand, for backends that have no kernel of their own to write them."""

    def fake(weights: _Tensors, *numbers: _Ints, out: _Tensors) -> None:
        _check(weights, **dict(zip(("layers", "modules"), numbers, strict=False)))
        check_out(weights, out, dtype)

    def kernel(weights: _Tensors, *numbers: _Ints, out: _Tensors) -> None:
        _check_apart(weights, check_out(weights, out, dtype))
        for o, found in zip(out, getattr(torch.ops.dimap, name)(weights, *numbers), strict=True):
            o.copy_(found)

    torch.library.register_fake(f"dimap::{name}.out", fake)
    _IMPLEMENTATIONS.impl(f"{name}.out", kernel, "CompositeExplicitAutograd")


_add_out("score", torch.float32)
_add_out("select", torch.bool)


def _count_writes(name: str, written: str = "weights") -> None:
    """Let autograd know that the operator writes tensors, as it knows of torch's operators."""
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.dimap, base), overload or "default")

    def kernel(
        keys: torch._C.DispatchKeySet, weights: _Tensors, *rest: object, **named: _Tensors
    ) -> None:
        dtensor = sys.modules.get("torch.distributed.tensor")  # not loaded: then there is none
        if dtensor is not None and any(isinstance(w, dtensor.DTensor) for w in weights):
            import_module(".distributed._dtensor", __package__)  # has the rules for them
        torch.autograd.graph.increment_version(named.get(written, weights))
        after = keys & torch._C._after_ADInplaceOrView_keyset
        operator.redispatch(after, weights, *rest, **named)

    _IMPLEMENTATIONS.impl(name, kernel, "ADInplaceOrView", with_keyset=True)


for _name in ("prune_", "apply_", "nm_"):
    _count_writes(_name)
for _name in ("score.out", "select.out"):
    _count_writes(_name, "out")
