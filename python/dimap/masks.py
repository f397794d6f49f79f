"""Masks in files and back on models: one bit for each weight.

File format, version 1: a safetensors file. For each mask there is a uint8 tensor under the
parameter's own name, [ceil(n / 8)] bytes for n weights: weight i (in flat, row-major order) is bit
i % 8 of byte i // 8, counted from the least significant; 1 is kept, 0 is pruned; the unused bits of
the last byte are 0. The file's metadata hold

    "dimap_masks"   "1", the format's version
    "shapes"        JSON object, parameter name -> list of sizes, in the order of the masks

and whatever else the writer added; of masks that dimap made

    "addresses"     JSON object, parameter name -> [module, stage, block, place], null for none: where
                    the layer stands in the network, whatever another library calls it

A reader refuses a version that it does not know.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from . import _C, ops
from ._files import open_safetensors, replacing, save_safetensors
from .distributed import check_whole, is_sharded
from .groups.identity import Address, same_weights

VERSION = "1"
_VERSION_KEY, _SHAPES_KEY = "dimap_masks", "shapes"


def save_masks(
    masks: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write masks to `path`, one bit a weight; a file that is there already is replaced.

    masks: parameter name -> bool tensor of the parameter's shape, any device, True = kept. The two are
        taken the other way round, too, with a FutureWarning.
    metadata: strings to store beside them.

    Raises TypeError or ValueError for masks that are not bool tensors and for metadata that are not
    strings or that use this format's own keys; OSError where the file cannot be written. The file
    appears complete or not at all.
    """
    if isinstance(masks, (str, os.PathLike)):
        warnings.warn("save_masks takes masks first, then path", FutureWarning, stacklevel=2)
        masks, path = cast("tuple[Mapping[str, Tensor], str]", (path, masks))
    _check_masks(masks)
    check_whole(masks.values(), "a file of masks")
    extra = dict(metadata or {})
    for key, value in extra.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
        if key in (_VERSION_KEY, _SHAPES_KEY):
            raise ValueError(f"metadata must not use the format's own key {key!r}")
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    packed = {name: pack(mask) for name, mask in masks.items()}
    extra |= {_VERSION_KEY: VERSION, _SHAPES_KEY: json.dumps(shapes)}
    with replacing(Path(path), force=True) as temporary:
        save_safetensors(temporary, packed, extra)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read what `save_masks` wrote: parameter name -> bool tensor on the CPU, in the same order.

    Raises OSError where the file cannot be read; ValueError where it is damaged, is no mask file,
    or is of a version that this dimap does not know.
    """
    with open_masks(path) as masks:
        return Masks(masks, masks.addresses)


@contextmanager
def open_masks(path: str | os.PathLike[str]) -> Iterator[MaskFile]:
    """`load_masks` for files larger than memory: each mask is read when it is asked for.

    Raises as `load_masks`; what is wrong with one mask, when that one is read.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if _VERSION_KEY not in metadata:
            raise ValueError(f"{path} must be a mask file of dimap, got another safetensors file")
        if (found := metadata[_VERSION_KEY]) != VERSION:
            raise ValueError(f"{path} must have mask format version {VERSION}, got {found!r}")
        shapes = _shapes(path, metadata.get(_SHAPES_KEY, ""))
        if odd := sorted(shapes.keys() ^ set(file.keys())):
            raise ValueError(
                f"{path} must have one shape for each mask, got a mismatch at {odd[0]}"
            )
        yield MaskFile(path, file, shapes, _addresses(path, metadata.get("addresses", "{}")))


class Masks(dict[str, Tensor]):
    """Masks by parameter name, with the address of each in the network where it is known."""

    def __init__(self, masks: Mapping[str, Tensor], addresses: Mapping[str, Address]) -> None:
        super().__init__(masks)
        self.addresses = dict(addresses)


class MaskFile(Mapping[str, Tensor]):
    """Masks that are read from a file when they are asked for; addresses as in `Masks`."""

    def __init__(
        self,
        path: Path,
        file: Any,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, Address],
    ) -> None:
        self._path, self._file = path, file
        self.shapes, self.addresses = shapes, addresses

    def __getitem__(self, name: str) -> Tensor:
        return _unpack(self._path, name, self._file.get_tensor(name), self.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def apply_masks(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set the weights that `masks` drop to zero, in place; what has no mask stays as it is.

    model: an nn.Module, or a state dict.
    masks: parameter name -> bool tensor of the parameter's shape, True = kept. The names may be
        those of another spelling of the model, see `fit_masks`.

    Raises TypeError for wrong types; ValueError where a mask names no parameter of the model or has
    another shape. All of them are checked before anything is changed.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(
            f"model must be an nn.Module or a mapping of names to tensors, got {_kind(model)}"
        )
    weights: Mapping[str, Tensor] = (
        model
        if isinstance(model, Mapping)
        else dict(model.named_parameters(remove_duplicate=False))
    )
    zero_dropped((weights[name], mask) for name, mask in fit_masks(masks, weights).items())


def zero_dropped(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set tensors to +0 where their bool mask is False, all of a device at once.

    A mask may be on another device than its tensor. Of DTensors each rank does its own part.
    """
    groups: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for tensor, mask in pairs:
        if is_sharded((tensor, mask)):
            from .distributed import _dtensor

            tensor, mask = _dtensor.local_pair(tensor, mask)
        # Other types go through PyTorch.
        if tensor.device.type in ("cpu", "cuda") and tensor.dtype in ops.DTYPES:
            tensors, masks = groups.setdefault(tensor.device, ([], []))
            tensors.append(tensor)
            masks.append(mask.to(tensor.device))
        else:
            with torch.no_grad():
                tensor.masked_fill_(~mask.to(tensor.device), 0)
    for tensors, masks in groups.values():
        ops.apply_(tensors, masks)


def fit_masks(masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks under the names of `weights`, checked to fit them; nothing is changed.

    masks: under any spelling of the same model: with or without what torch.compile, DataParallel,
        FSDP or activation checkpointing put into names, behind another prefix, or as another
        library or its files call them, fused or split (qkv; q, k, v: rows of the fused mask).

    Raises as `apply_masks`.
    """
    _check_masks(masks)
    for name, weight in weights.items():
        if name in masks and not isinstance(weight, Tensor):
            raise TypeError(f"{name} of the model must be a tensor, got {_kind(weight)}")
    wanted = {name: tuple(w.shape) for name, w in weights.items() if isinstance(w, Tensor)}
    fitted: dict[str, Tensor] = {}
    for same in fit_shapes(masks, wanted):
        fitted |= same.load()
    for name in fitted:
        if weights[name].is_meta:
            raise ValueError(f"{name} must hold weights to prune, got a tensor on the meta device")
    return fitted


@dataclass(frozen=True)
class SameMasks:
    """Masks of the same weights in two spellings: what a mask means, or several that were fused.

    names: of the weights. wanted: their shapes.
    """

    masks: Mapping[str, Tensor]
    given: tuple[str, ...]
    names: tuple[str, ...]
    wanted: Mapping[str, tuple[int, ...]]

    def load(self) -> dict[str, Tensor]:
        """The masks under the names of the weights. Raises ValueError where they are of other shapes."""
        found = [self.masks[name] for name in self.given]
        mask = found[0] if len(found) == 1 else torch.cat(found)
        rows = [self.wanted[name][0] for name in self.names] if len(self.names) > 1 else []
        first = self.wanted[self.names[0]]
        whole = (sum(rows), *first[1:]) if rows else first
        if (
            mask.ndim != len(whole)
            and mask.shape[-1:] == whole[-1:]
            and mask.numel() == math.prod(whole)
        ):
            mask = mask.reshape(whole)  # experts stacked in one tensor, or one below the other
        if (got := tuple(mask.shape)) != whole:
            where = f"the mask of {' and '.join(self.given)}"
            raise ValueError(f"{where} must have the weight's shape {whole}, got {got}")
        return dict(zip(self.names, mask.split(rows) if rows else [mask], strict=True))


def fit_shapes(
    masks: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]
) -> list[SameMasks]:
    """`fit_masks` on the shapes of weights: no mask is read before it is loaded.

    Raises ValueError where a mask means none of these names.
    """
    shapes = (
        masks.shapes
        if isinstance(masks, MaskFile)
        else {name: tuple(mask.shape) for name, mask in masks.items()}
    )
    pairs = same_weights(shapes, wanted, getattr(masks, "addresses", None))
    return [SameMasks(masks, given, names, wanted) for given, names in pairs]


def _check_masks(masks: Mapping[str, Tensor]) -> None:
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a mapping of names to bool tensors, got {_kind(masks)}")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"masks must be under parameter names, got {name!r}")
        if not isinstance(mask, Tensor):
            raise TypeError(f"the mask of {name} must be a tensor, got {_kind(mask)}")
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask of {name} must be bool, got {mask.dtype}")


def _kind(value: object) -> str:
    return type(value).__name__


def pack(mask: Tensor) -> Tensor:
    """A mask's bits as they lie in a file, uint8 [ceil(n / 8)]."""
    flat = mask.detach().cpu().reshape(-1).numpy()
    return torch.from_numpy(np.frombuffer(bytearray(_C.pack_bits(flat.data)), np.uint8))


def _unpack(path: Path, name: str, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = math.prod(shape)
    want = (count + 7) // 8
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (want,):
        raise ValueError(
            f"{path}: the mask of {name} must be uint8 [{want}] for shape {list(shape)}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError(f"{path}: the mask of {name} must have zeros in its unused bits, got ones")
    return torch.from_numpy(bits[:count]).view(torch.bool).reshape(shape)


def _shapes(path: Path, text: str) -> dict[str, tuple[int, ...]]:
    from pydantic import NonNegativeInt, TypeAdapter

    try:
        return TypeAdapter(dict[str, tuple[NonNegativeInt, ...]]).validate_json(text, strict=True)
    except ValueError:
        got = repr(text[:80])
        raise ValueError(f"{path} must hold the shapes of its masks as JSON, got {got}") from None


def _addresses(path: Path, text: str) -> dict[str, Address]:
    try:
        return {name: Address(*place) for name, place in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} must hold addresses as JSON, got {text[:80]!r}") from None
