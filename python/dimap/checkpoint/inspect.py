"""What a checkpoint holds: its family, modules, layers, and how sparse they are already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from tempfile import TemporaryFile
from typing import Any

from .. import _C
from ..families import Family
from ..groups import AUX, Grouping, Slice, describe, propose, whole, wholes
from ..groups.nm import as_groups, in_layers, input_axes, pattern_of
from .base import Checkpoint, Progress, Silent
from .compact import decoded
from .header import Entry
from .native import READ, Told, elements, opened, write_fully
from .shards import Shard, Shards


@dataclass
class Count:
    """Weights of a layer, of a module, or of all.

    dtypes: as torch names them, "float32"; of a module with several, each once.
    nm: of a layer that can be pruned, the N:M that it has ("2:4"), if any.
    """

    name: str
    weights: int = 0
    nonzero: int = 0
    dtypes: list[str] = field(default_factory=list)
    layers: list[Count] = field(default_factory=list)
    nm: str | None = None

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

    @property
    def nm(self) -> str:
        """Which N:M how many of the layers that can be pruned have: "2:4 in 48 of 48 layers"."""
        return in_layers([x.nm for m in self.modules if m.name != AUX for x in m.layers])

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
            "nm": self.nm,
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
    axes = input_axes(modules, checkpoint.shapes())
    count = _count_in_files if isinstance(checkpoint, Shards) else _count_in_memory
    nonzero, most = count(checkpoint, names, axes, progress)
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
            found = [most[p] for p in layer.parameters if p in most]
            if len(found) == len(layer.parameters):
                largest = [max(column) for column in zip(*found, strict=True)]
                one.nm = pattern_of(largest, one.nonzero, one.weights)
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
            "of no known family: grouped by the words of its names, which explain "
            f"{100 * guess.covered:.1f} % of the weights in the blocks\n{describe(modules)}\n{error}"
            if guess.found
            else f"of no known family, and its names do not say what to prune: all is under aux\n{error}"
        )
        return Grouping(modules, {}, (told,)), True


# Of each tensor how many weights are not zero; and of those to prune, the most in groups of 0 … 16.
Counted = tuple[dict[str, int], dict[str, list[int]]]


class _Counts:
    """What `_C` is to count of tensors in files, and of which it is told their groups, too."""

    def __init__(self) -> None:
        self.tensors: dict[str, tuple[int, Entry]] = {}
        self.grouped: dict[str, tuple[int, int, int, int, int, int, int]] = {}

    def add(self, name: str, file: int, entry: Entry, axis: int | None) -> None:
        """A tensor that is stored as it is. axis: of its groups, where it can have them."""
        if axis is None or not entry.dtype.size or not entry.dtype.mask:
            self.tensors[name] = file, entry
            return
        offset, _, size, mask = elements(entry)
        self.grouped[name] = (file, offset, size, mask, *as_groups(entry.shape, axis))

    def made(self, files: list[tuple[int, str]], told: Told) -> Counted:
        tensors = [(file, *elements(entry)) for file, entry in self.tensors.values()]
        counts = _C.count_nonzero(files, tensors, progress=told)
        groups = _C.count_groups(files, list(self.grouped.values()), progress=told)
        told.finish()
        found = {name: count for name, (count, _) in zip(self.grouped, groups, strict=True)}
        for (name, (_, entry)), count in zip(self.tensors.items(), counts, strict=True):
            found[name] = count if entry.dtype.size else entry.numel()
        return found, {name: most for name, (_, most) in zip(self.grouped, groups, strict=True)}


def _count_in_files(
    checkpoint: Checkpoint, names: list[str], axes: Mapping[str, int], progress: Progress
) -> Counted:
    """Of a tensor that is stored as bits and values, the values are counted, and the bits looked at."""
    assert isinstance(checkpoint, Shards)
    number = {shard.path: file for file, shard in enumerate(checkpoint.shards)}
    wanted = _Counts()
    compact: dict[str, list[str]] = {}  # tensors, and of each itself or its slices
    for name in names:
        shard = checkpoint.home[whole(name)]
        file, (values, bits) = number[shard.path], shard.layout.places[whole(name)]
        if shard.layout.form == "compact":
            compact.setdefault(whole(name), []).append(name)
        elif bits is None:
            wanted.add(name, file, values.part(name), axes.get(name))
        else:
            dense = shard.entries[whole(name)].part(name)
            at = name.at * dense.numel() if isinstance(name, Slice) else 0
            grid = as_groups(dense.shape, axes[name]) if name in axes else (0, 0, 0)
            wanted.grouped[name] = (file, bits.begin * 8 + at, 0, 0, *grid)
            if not isinstance(name, Slice):  # whose values no header tells apart
                wanted.tensors[name] = file, values
    with opened(checkpoint.files, READ) as files:
        found, most = wanted.made(files, Told(progress))
    for name, parts in compact.items():
        more = _count_expanded(checkpoint.home[name], name, parts, axes, progress)
        found |= more[0]
        most |= more[1]
    return found, most


def _count_expanded(
    shard: Shard, name: str, parts: list[str], axes: Mapping[str, int], progress: Progress
) -> Counted:
    """Of a tensor of a compact file and its slices: its blocks are laid out side by side to be counted."""
    entry = replace(shard.entries[name], begin=0, end=shard.entries[name].nbytes)
    with TemporaryFile() as file:
        output = (file.fileno(), f"what {shard.path} is expanded to")

        def write(_: Entry, first: int, data: memoryview) -> int:
            size = len(data)
            write_fully(output, data, first * (entry.dtype.size or 1))
            return size

        progress.step("reading", entry.nbytes)
        for size in decoded(shard.path, shard.table([name]), write):
            progress.advance(size)
        wanted = _Counts()
        for part in parts:
            wanted.add(part, 0, entry.part(part), axes.get(part))
        return wanted.made([output], Told(Silent()))


def _count_in_memory(
    checkpoint: Checkpoint, names: list[str], axes: Mapping[str, int], progress: Progress
) -> Counted:
    from ..pruning import count_nonzero, most_in_groups

    progress.step("reading", sum(checkpoint.tensors[name].nbytes for name in wholes(names)))
    counts, most = {}, {}
    for name in names:
        tensor, spec = checkpoint.get(whole(name)), checkpoint.tensors[whole(name)]
        part = tensor[name.at] if isinstance(name, Slice) else tensor
        counts[name] = count_nonzero(part)
        if name in axes and spec.dtype.size and spec.dtype.mask:
            most[name] = most_in_groups(part, axes[name])
        progress.advance(spec.part_spec(name).nbytes)
    return counts, most
