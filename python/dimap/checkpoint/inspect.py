"""What a checkpoint holds: its family, modules, layers, and how sparse they are already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from .. import _C
from ..families import Family
from ..groups import Grouping, Slice, describe, propose, whole, wholes
from .base import Checkpoint, Progress
from .compact import decoded
from .header import Entry
from .native import READ, Told, elements, opened
from .shards import Shard, Shards


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
    """A checkpoint, counted.

    families: of its towers, by their names; "" where there is one; none where the caller's patterns
        or the words of the names tell the modules.
    proposed: whether the modules are only what the names suggest: it is of no known family.
    """

    path: str
    form: str
    families: dict[str, Family]
    metadata: dict[str, str]
    notes: list[str]
    modules: list[Count]
    total: Count
    proposed: bool = False

    def to_dict(self) -> dict[str, Any]:
        told = {t: {"name": f.name, "models": f.models} for t, f in self.families.items()}
        total = self.total.to_dict()
        return {
            "path": self.path,
            "form": self.form,
            "family": told.get(""),
            "towers": told,
            "proposed": self.proposed,
            "metadata": self.metadata,
            "notes": self.notes,
            **{key: total[key] for key in ("weights", "nonzero", "sparsity", "dtypes")},
            "modules": [module.to_dict() for module in self.modules],
        }


def inspect(checkpoint: Checkpoint, progress: Progress) -> Inspection:
    """Count every weight, reading each tensor once. Elements of less than a byte count as nonzero.

    Of names of no known family the modules are those that their words suggest. Raises ValueError
    where the checkpoint's `choice` does not fit it.
    """
    grouping, proposed = _grouping(checkpoint)
    modules = grouping.modules
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
                spec = checkpoint.tensors[whole(parameter)].part_spec(parameter)
                for counted in (one, module, total):
                    counted.add(spec.numel(), nonzero[parameter], [spec.dtype.name])
            module.layers.append(one)
        counts.append(module)
    notes = [*checkpoint.notes, *grouping.notes]
    told = (checkpoint.path, checkpoint.form, grouping.families, checkpoint.metadata, notes)
    return Inspection(*told, counts, total, proposed)


def _grouping(checkpoint: Checkpoint) -> tuple[Grouping, bool]:
    """How the checkpoint is grouped, and whether that is only a proposal."""
    try:
        return checkpoint.group(), False
    except ValueError as error:
        if checkpoint.choice or not checkpoint.shapes():
            raise
        guess, modules = propose(checkpoint.shapes())
        told = (
            f"of no known family: the modules are what the names suggest, {100 * guess.covered:.1f} % "
            f"of the weights in the blocks\n{describe(modules)}\n{error}"
        )
        return Grouping(modules, {}, (told,)), True


def _count_in_files(checkpoint: Shards, names: list[str], progress: Progress) -> dict[str, int]:
    """Of a tensor that is stored as bits and values, the values are counted."""
    number = {shard.path: file for file, shard in enumerate(checkpoint.shards)}
    stored: dict[str, tuple[int, Entry]] = {}
    found: dict[str, int] = {}
    compact: dict[Path, dict[str, list[str]]] = {}  # its tensors, and those and slices of them
    for name in names:
        home = checkpoint.home[whole(name)]
        place = home.layout.places[whole(name)]
        if home.layout.form == "compact":
            compact.setdefault(home.path, {}).setdefault(whole(name), []).append(name)
        elif place.bits and isinstance(name, Slice):
            found[name] = _count_bits(home.path, place.bits, name, home.entries[name.parameter])
        else:
            stored[name] = number[home.path], place.values.part(name)
    told = Told(progress)
    with opened(checkpoint.files, READ) as files:
        tensors = [(file, *elements(entry)) for file, entry in stored.values()]
        counts = _C.count_nonzero(files, tensors, progress=told)
    told.finish()
    for (name, (_, entry)), count in zip(stored.items(), counts, strict=True):
        found[name] = count if entry.dtype.size else entry.numel()
    for shard in checkpoint.shards:
        if parts := compact.get(shard.path):
            found |= _count_in_blocks(shard, parts, progress)
    return found


def _count_in_blocks(
    shard: Shard, parts: Mapping[str, list[str]], progress: Progress
) -> dict[str, int]:
    """Of a compact file. parts: of its tensors, by their names."""

    def count(entry: Entry, first: int, data: memoryview) -> tuple[int, Counter[str]]:
        size, counts = entry.dtype.size or 1, Counter[str]()
        begin = entry.begin + first * size
        for name in parts[entry.name]:
            part = entry.part(name)
            mine = data[max(part.begin - begin, 0) : max(part.end - begin, 0)]
            counts[name] = _C.count_set(mine, size, entry.dtype.mask)
        return len(data), counts

    found = Counter[str]()
    progress.step("reading", sum(shard.entries[name].nbytes for name in parts))
    for size, counts in decoded(shard.path, shard.table(parts), count):
        progress.advance(size)
        found += counts
    entries = ((name, shard.entries[whole(name)].part(name)) for n in parts for name in parts[n])
    return {name: found[name] if e.dtype.size else e.numel() for name, e in entries}


def _count_bits(path: Path, bits: Entry, name: Slice, dense: Entry) -> int:
    """The ones among the bits of a slice, whose values no header tells apart."""
    size = prod(dense.shape[1:])
    first, last = name.at * size, (name.at + 1) * size
    with open(path, "rb") as file:
        file.seek(bits.begin + first // 8)
        data = int.from_bytes(file.read((last + 7) // 8 - first // 8), "little")
    return (data >> first % 8 & (1 << size) - 1).bit_count()


def _count_in_memory(
    checkpoint: Checkpoint, names: list[str], progress: Progress
) -> dict[str, int]:
    from ..pruning import count_nonzero

    progress.step("reading", sum(checkpoint.tensors[name].nbytes for name in wholes(names)))
    counts = {}
    for name in names:
        tensor, spec = checkpoint.get(whole(name)), checkpoint.tensors[whole(name)]
        counts[name] = count_nonzero(tensor[name.at] if isinstance(name, Slice) else tensor)
        progress.advance(spec.part_spec(name).nbytes)
    return counts
