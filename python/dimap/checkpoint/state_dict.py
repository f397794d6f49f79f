"""Checkpoints whose weights are state dicts: files of torch.save, and timm models."""

from __future__ import annotations

import errno
import importlib
import os
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _timm
from .._errors import Damaged, first_line
from .._files import naming, save_safetensors
from ..groups.tied import ties_of
from ..masks import apply_masks
from .base import Checkpoint
from .bitmask import Format, check_storable, write_packed
from .copies import alike, matrices, tensors_of, under_names
from .header import Spec
from .locate import PICKLED, Weights, shorten

# Keys under which training scripts put the weights, and those of their averages.
NESTS = ("model", "state_dict", "model_state_dict", "model_state", "module", "net", "params")
AVERAGE = re.compile(r"(?i)(.*_)?(ema|swa|avg|averaged)(_.*)?|(shadow|collected)_params\[\]")
# What training keeps beside the weights: tensors of their shapes, which are no weights.
BESIDE = re.compile(r"(?i).*(optim|sched|scaler|rng).*|opt")
LIST = "[]"  # ends the name of tensors that have no names

# Classes of plain values, which may lie beside the weights: reading them runs no code of a file's own.
HARMLESS = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|collections\.(defaultdict|deque|Counter)"
    r"|datetime\.(datetime|date|timedelta)|_codecs\.encode|numpy\.(ndarray|dtype|dtypes\.\w+DType)"
    r"|numpy\.(_core|core)\.multiarray\.(scalar|_reconstruct)|easydict\.EasyDict"
    r"|omegaconf\.(base|dictconfig|listconfig|nodes)\.\w+|typing\.Any"
    r"|(pytorch_)?lightning\.\S+\.AttributeDict|(lightning\.)?fabric\.\S+\.AttributeDict"
)

# What torch says of a class that it does not know.
_REFUSED = re.compile(r"nsupported (?:global: )?GLOBAL ([\w.]+)|but got <class '([\w.]+)'>")


@dataclass
class Nest:
    """A state dict in a file of torch.save.

    root: what the file holds. name: the keys from there to the state dict, as "net.teacher".
    copies: other state dicts of the same names and shapes, by such keys. notes: for the user.
    """

    root: Any
    name: str
    state: Mapping[str, Any]
    copies: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class StateDict(Checkpoint):
    """State dicts in memory, or mapped from their files.

    nests: that of each file.
    """

    endings = (".safetensors", *PICKLED)

    def __init__(
        self, path: str, form: str, nests: Mapping[Path, Nest], metadata: Mapping[str, str]
    ) -> None:
        self.nests = dict(nests)
        self.home: dict[str, Path] = {}
        self._tensors: dict[str, Tensor] = {}
        for file, nest in nests.items():
            for name, value in nest.state.items():
                if not isinstance(name, str):
                    raise ValueError(f"{file} must have strings for names, got {name!r}")
                if not isinstance(value, Tensor):
                    continue
                if name in self._tensors:
                    raise ValueError(f"{path}: a tensor must be in one file, got {name} in two")
                self._tensors[name], self.home[name] = value, file
        specs = {name: Spec.of(tensor) for name, tensor in self._tensors.items()}
        super().__init__(path, form, [] if form == "timm" else list(nests), specs, metadata)
        for nest in nests.values():
            self.notes += nest.notes

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach()

    def ties(self) -> Sequence[tuple[str, ...]]:
        return ties_of({name: self._tensors[name] for name in self.shapes()})

    def rewrite(
        self, targets: Sequence[Path], state: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> None:
        # What is in `state` is in memory what `nests` hold.
        self.mask_copies(masks)
        self.save(targets)

    def mask_copies(self, masks: Mapping[str, Tensor]) -> None:
        """Set to zero in the other copies what the masks drop in the weights."""
        for nest in self.nests.values():
            own = {name: mask for name, mask in masks.items() if name in nest.state}
            for name, copy in nest.copies.items():
                try:
                    apply_masks(tensors_of(copy), own)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}: {name!r} must be a whole copy to be given the same masks, or be "
                        f"left out by --key: {error}"
                    ) from error

    def save(
        self,
        targets: Sequence[Path],
        *,
        safetensors: bool = False,
        pack: Collection[str] = (),
        form: Format = "dense",
    ) -> None:
        """Fill the empty files with what the tensors are now, as torch.save does it or safetensors.

        pack: of a bitmask file, the tensors that are stored as bits and values where that is smaller.
        """
        if not safetensors:
            for target, nest in zip(targets, self.nests.values(), strict=True):
                _save(nest.root, target)
            return
        state = {name: self.get(name) for name in self.tensors}
        try:
            for name, tensor in state.items():
                check_storable(name, tensor)
        except ValueError as error:
            raise ValueError(f"{error}: an output that ends in .pth keeps it as it is") from error
        if form != "dense":
            write_packed(targets[0], state, self.metadata, pack, form, self.path)
        else:
            save_safetensors(targets[0], state, self.metadata)


def open_timm(path: str, *, random_init: bool) -> StateDict:
    """The weights of "timm:NAME"; its outputs name the architecture in their metadata."""
    name = path.removeprefix("timm:")
    state = _timm.create(name, pretrained=not random_init).state_dict()
    metadata = {"format": "pt", "architecture": name}
    return StateDict(path, "timm", {Path(name): Nest(state, "", state)}, metadata)


def open_pickled(
    path: str, form: str, found: Weights, key: str | None, all_copies: bool
) -> StateDict:
    """The weights of files of torch.save: at the top, where `NESTS` says, or under `key`."""
    nests = {f: choose_nest(_load(f), str(f), key, all_copies) for f in found.files}
    checkpoint = StateDict(path, form, nests, {"format": "pt"})
    if found.listing is not None:
        found.listing.check(checkpoint.home)
    return checkpoint


def choose_nest(root: Any, where: str, key: str | None = None, all_copies: bool = False) -> Nest:
    """The state dict that is meant, and what becomes of others like it.

    Averages of it are given the same masks; other copies too with `all_copies`. With `key` alone,
    copies are taken out of the root. Raises ValueError where none is found, or several are.
    """
    if not isinstance(root, Mapping):
        raise ValueError(f"{where} must hold a state dict, got a {type(root).__name__}")
    found = {name: (holder, state) for name, holder, state in _nests(root)}
    whole = {name: matrices(state) for name, (_, state) in found.items() if matrices(state)}
    whole = whole or {name: {} for name in found}
    listed = shorten(map(repr, filter(None, whole))) or "none"
    if key is not None:
        meant = [name for name in found if name == key or name.endswith(f".{key}")]
        if len(meant) != 1:
            raise ValueError(f"{where} must hold weights under {key!r}, got {listed}")
    else:
        named = [name for name in whole if not name.endswith(LIST)]
        main = [name for name in named if not _is_average(name)] or named
        meant = [name for name in main if name.rpartition(".")[2] in NESTS]
        meant = meant or [name for name in main if name == ""] or main
        if all_copies and all(alike(whole[meant[0]], whole[name]) for name in meant):
            meant = meant[:1]
    if not meant:
        raise ValueError(
            f"{where} must hold weights, or hold them under 'model', 'state_dict' or another name, "
            f"got {shorten(map(repr, root)) or 'an empty dict'}"
        )
    nest = Nest(root, meant[0], found[meant[0]][1])
    for name, shapes in whole.items():
        holder, state = found[name]
        if name in ("", *meant):
            continue
        if name.endswith(LIST) and _is_average(name):
            state = under_names(state, nest.state, f"{where}: {name!r}")
            shapes = matrices(state)
        if not alike(matrices(nest.state), shapes):
            nest.notes.append(f"{name!r} is kept as it is: its weights are not pruned")
        elif all_copies or (key is None and _is_average(name)):
            nest.copies[name] = state
            nest.notes.append(f"{name!r}, a copy of these weights, is given the same masks")
        elif key is not None and isinstance(holder, dict):
            tensor = next(iter(state.values()))
            del holder[next(k for k, v in holder.items() if v is state or _lists(v, tensor))]
        else:
            meant.append(name)
    if len(meant) > 1:
        raise ValueError(
            f"{where} must hold one set of weights, got {listed}: --key NAME says which one is pruned, "
            "without copies of it in the output, or with them by --all-copies"
        )
    return nest


def _lists(value: Any, tensor: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(x is tensor for x in value)


def _is_average(name: str) -> bool:
    return any(AVERAGE.fullmatch(part) for part in name.split("."))


def _nests(value: Any, place: str = "", holder: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """Every mapping of names to tensors: the keys that lead to it, what holds it, itself.

    A list of tensors is one of numbers to tensors. What optimizers keep is left out.
    """
    if isinstance(value, (list, tuple)):
        if any(isinstance(x, Tensor) for x in value):
            yield place + LIST, holder, {str(number): x for number, x in enumerate(value)}
        inside: Iterable[tuple[Any, Any]] = ((str(n), inner) for n, inner in enumerate(value))
    elif isinstance(value, Mapping):
        if any(isinstance(x, Tensor) for x in value.values()):
            yield place, holder, value
        inside = value.items()
    else:
        return
    for name, inner in inside:
        if isinstance(name, str) and not BESIDE.fullmatch(name):
            yield from _nests(inner, f"{place}.{name}" if place else name, value)


def _load(path: Path) -> Any:
    with open(path, "rb"):
        pass  # for Python's own errors, which name the file
    allowed: list[Any] = []
    mapped = zipfile.is_zipfile(path)  # files of torch < 1.6 are no archives and cannot be mapped
    if mapped:
        _check_sums(path)
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except UnicodeEncodeError:  # torch's reader takes names in UTF-8 only
            raise
        except Exception as error:
            wanted = _REFUSED.search(str(error))
            if wanted is None:
                raise Damaged(
                    f"{path} must be a complete file of torch.save, got one that is truncated, "
                    f"damaged or of another format ({_fault(path, error)})"
                ) from error
            name = wanted[1] or wanted[2]
            value = _harmless(name)
            if value is None or (value, name) in allowed:
                raise ValueError(
                    f"{path} must hold weights and plain values only (it is read with "
                    f"weights_only=True), got {name}; if you trust the file, load it with "
                    "torch.load(..., weights_only=False) and save its weights alone"
                ) from error
            allowed.append((value, name))


def _fault(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot read."""
    with open(path, "rb") as file:
        head, size = file.read(2), os.fstat(file.fileno()).st_size
    if size < 10:
        return f"it has {size} bytes"
    if head not in (b"PK", b"\x80\x02"):
        return "it does not begin as one"
    if isinstance(error, EOFError) or (head == b"PK" and not zipfile.is_zipfile(path)):
        return f"its end is missing, after {size} bytes"
    return first_line(error)


def _check_sums(path: Path) -> None:
    """Refuse an archive of which a record is not what was written: torch does not look at its sum.

    torch may have been told to write none (`set_crc32_options`): then all are 0.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            bad = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            bad = str(error)
    if bad:
        raise Damaged(
            f"{path} must be a complete file of torch.save, got one whose record {bad} is damaged"
        )


def _harmless(name: str) -> Any:
    """A class of `HARMLESS`, where it can be imported."""
    if not HARMLESS.fullmatch(name):
        return None
    module, _, attribute = name.replace("numpy.core.", "numpy._core.").rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return None


def _save(root: Any, target: Path) -> None:
    with naming(target):
        try:
            with open(target, "wb") as file:
                torch.save(root, file)
        except RuntimeError as error:  # torch's word for a write that failed, over the true one
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise OSError(errno.EIO, f"could not be written ({error})") from error
