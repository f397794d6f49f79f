"""What a checkpoint holds: its family, modules, layers, and how sparse they are already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import _C
from ..families import Family
from ..groups import family_of
from .base import Checkpoint, Progress
from .engine import READ, Told, elements, opened
from .folder import Shards


@dataclass
class Count:
    """Weights of a layer, of a module, or of all.

    dtypes: as torch names them, "float32"; of a module with several, each once.
    """

    name: str
    weights: int = 0
    nonzero: int = 0
    dtypes: list[str] = field(default_factory=list)
    layers: list[Count] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero, in [0, 1]."""
        return 1 - self.nonzero / self.weights if self.weights else 0.0

    def add(self, weights: int, nonzero: int, dtypes: Iterable[str]) -> None:
        self.weights += weights
        self.nonzero += nonzero
        self.dtypes += [dtype for dtype in dtypes if dtype not in self.dtypes]

    def to_dict(self) -> dict[str, Any]:
        layers = [layer.to_dict() for layer in self.layers]
        return asdict(self) | {"sparsity": self.sparsity, "layers": layers}


@dataclass
class Inspection:
    """A checkpoint, counted."""

    path: str
    form: str
    family: Family | None
    metadata: dict[str, str]
    notes: list[str]
    modules: list[Count]
    total: Count

    def to_dict(self) -> dict[str, Any]:
        family, total = self.family, self.total.to_dict()
        return {
            "path": self.path,
            "form": self.form,
            "family": family and {"name": family.name, "models": family.models},
            "metadata": self.metadata,
            "notes": self.notes,
            **{key: total[key] for key in ("weights", "nonzero", "sparsity", "dtypes")},
            "modules": [module.to_dict() for module in self.modules],
        }


def inspect(checkpoint: Checkpoint, progress: Progress) -> Inspection:
    """Count every weight, reading each tensor once. Elements of less than a byte count as nonzero.

    Raises ValueError where the names are of no known family.
    """
    modules = checkpoint.find_modules()
    names = [p for layers in modules.values() for layer in layers for p in layer.parameters]
    if isinstance(checkpoint, Shards):
        nonzero = _count_in_files(checkpoint, names, progress)
    else:
        nonzero = _count_in_memory(checkpoint, names, progress)
    total = Count("all")
    counts = []
    for name, layers in modules.items():
        module = Count(name)
        for layer in layers:
            one = Count(layer.name)
            for parameter in layer.parameters:
                spec = checkpoint.tensors[parameter]
                for counted in (one, module, total):
                    counted.add(spec.numel(), nonzero[parameter], [spec.dtype.name])
            module.layers.append(one)
        counts.append(module)
    family = family_of({name: checkpoint.tensors[name].shape for name in names})
    told = (checkpoint.path, checkpoint.form, family, checkpoint.metadata, checkpoint.notes)
    return Inspection(*told, counts, total)


def _count_in_files(checkpoint: Shards, names: list[str], progress: Progress) -> dict[str, int]:
    """Of a tensor that is stored as bits and values, the values are counted."""
    number = {shard.path: file for file, shard in enumerate(checkpoint.shards)}
    homes = [checkpoint.home[name] for name in names]
    stored = [home.layout.places[name].values for name, home in zip(names, homes, strict=True)]
    told = Told(progress)
    with opened(checkpoint.files, READ) as files:
        tensors = [(number[h.path], *elements(e)) for h, e in zip(homes, stored, strict=True)]
        counts = _C.count_nonzero(files, tensors, progress=told)
    told.finish()
    return {
        entry.name: count if entry.dtype.size else entry.numel()
        for entry, count in zip(stored, counts, strict=True)
    }


def _count_in_memory(
    checkpoint: Checkpoint, names: list[str], progress: Progress
) -> dict[str, int]:
    from ..pruning import count_nonzero

    progress.step("reading", sum(checkpoint.tensors[name].nbytes for name in names))
    counts = {}
    for name in names:
        counts[name] = count_nonzero(checkpoint.get(name))
        progress.advance(checkpoint.tensors[name].nbytes)
    return counts
