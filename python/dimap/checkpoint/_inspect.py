"""What a checkpoint holds: its family, modules, layers, and how sparse they are already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .._progress import Bar
from ..families import Family
from ..groups import AUX, Layer, find_modules
from ..groups import family_of as family_of_names
from ..pruning import count_nonzero
from . import Checkpoint


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
        plain = asdict(self)
        layers = [layer.to_dict() for layer in self.layers]
        return plain | {"sparsity": self.sparsity, "layers": layers}


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
        family = self.family
        return {
            "path": self.path,
            "form": self.form,
            "family": family and {"name": family.name, "models": family.models},
            "metadata": self.metadata,
            "notes": self.notes,
            "weights": self.total.weights,
            "nonzero": self.total.nonzero,
            "sparsity": self.total.sparsity,
            "dtypes": self.total.dtypes,
            "modules": [module.to_dict() for module in self.modules],
        }

    def __rich__(self) -> Group:
        head = Table.grid(padding=(0, 2))
        head.add_column(style="bold")
        head.add_column(overflow="fold")
        head.add_row(self.form, Text(self.path))
        if self.family:
            head.add_row("family", Text(f"{self.family.name}: {self.family.models}"))
        columns = ("module", "layers", "weights", "nonzero", "sparsity", "dtype")
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
        for column in table.columns[1:5]:
            column.justify = "right"
        for module in self.modules:
            table.add_row(*_row(module, len(module.layers)))
        layers = sum(len(module.layers) for module in self.modules)
        for column, text in zip(table.columns, _row(self.total, layers), strict=True):
            column.footer = text
        return Group(head, table, *(Text(note, style="yellow") for note in self.notes))

    def layer_table(self) -> Table:
        """One line for each layer that can be pruned, module after module."""
        columns = ("layer", "module", "weights", "nonzero", "sparsity", "dtype")
        table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in table.columns[2:5]:
            column.justify = "right"
        for module in (module for module in self.modules if module.name != AUX):
            for layer in module.layers:
                name, *counts = _row(layer, 0)
                table.add_row(Text(name), module.name, *counts[1:])
            table.add_section()
        return table


def _row(count: Count, layers: int) -> tuple[str, ...]:
    share = f"{100 * count.sparsity:.2f} %"
    dtypes = ", ".join(count.dtypes)
    return (count.name, str(layers), f"{count.weights:,}", f"{count.nonzero:,}", share, dtypes)


def inspect(checkpoint: Checkpoint, bar: Bar) -> Inspection:
    """Count every weight, reading each tensor once.

    Raises ValueError where the names are of no known family.
    """
    modules = find_modules(checkpoint.tensors)
    family = family_of(modules, checkpoint.tensors)
    found = [p for layers in modules.values() for layer in layers for p in layer.parameters]
    sizes = {name: checkpoint.tensors[name].nbytes for name in found}
    nonzero = {n: count_nonzero(checkpoint.get(n)) for n in bar.over("reading", sizes)}
    total = Count("all")
    counts = []
    for name, layers in modules.items():
        module = Count(name)
        for layer in layers:
            one = Count(layer.name)
            for parameter in layer.parameters:
                tensor = checkpoint.tensors[parameter]
                dtype = str(tensor.dtype).removeprefix("torch.")
                for count in (one, module, total):
                    count.add(tensor.numel(), nonzero[parameter], [dtype])
            module.layers.append(one)
        counts.append(module)
    return Inspection(
        checkpoint.path,
        checkpoint.form,
        family,
        checkpoint.metadata,
        checkpoint.notes,
        counts,
        total,
    )


def family_of(modules: Mapping[str, list[Layer]], tensors: Mapping[str, Tensor]) -> Family | None:
    """The family by whose table `find_modules` grouped the tensors."""
    names = [p for layers in modules.values() for layer in layers for p in layer.parameters]
    shapes = {name: tuple(tensors[name].shape) for name in names}
    return family_of_names(shapes)
