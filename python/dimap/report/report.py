"""What a pruning did, counted: per layer, per module and for the whole model.

JSON schema "dimap.report", version 1 (`Report.to_dict`): the fields of `Report`, `ModuleReport` and
`LayerReport` below under their own names, the derived figures (density, removed, removed_percent,
flops_removed_percent, flops_nominal_removed_percent) beside them, null where a figure is unknown.
A field may be added without a new version; none is renamed, removed or given another meaning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..groups import position
from ..groups.nm import in_layers
from .text import Column, Fitting, make_console, names_in_blocks, plain, short, table, tiny

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = "dimap.report"
VERSION = 1
NAME = 24  # characters that a table has for a layer's name

_Built = TypeVar("_Built")


class _Counts:
    """Figures that follow from the counts; mixed into the three dataclasses below."""

    weights: int
    kept: int
    nonzero: int
    flops_dense: int | None
    flops_nominal: int | None
    flops: int | None

    @property
    def density(self) -> float:
        """kept / weights, in [0, 1]; 1 where there is nothing to keep."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def removed(self) -> int:
        return self.weights - self.kept

    @property
    def removed_percent(self) -> float:
        return 100 * self.removed / self.weights if self.weights else 0.0

    @property
    def flops_removed_percent(self) -> float | None:
        return _removed_percent(self.flops_dense, self.flops)

    @property
    def flops_nominal_removed_percent(self) -> float | None:
        return _removed_percent(self.flops_dense, self.flops_nominal)

    def _entries(self) -> dict[str, Any]:
        """Every field and every derived figure, for JSON."""
        derived = [name for name, value in vars(_Counts).items() if isinstance(value, property)]
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return {name: getattr(self, name) for name in names + derived}


def _removed_percent(dense: int | None, left: int | None) -> float | None:
    if dense is None or left is None:
        return None
    return 100 * (dense - left) / dense if dense else 0.0


@dataclass(frozen=True)
class LayerReport(_Counts):
    """One prunable layer.

    Attributes:
        name, module, stage, block, parameters, tower: as in `groups.Layer`.
        weights: how many the layer has.
        kept: how many the masks keep.
        nonzero: how many are not zero; less than `kept` where kept weights were zero already.
        threshold: smallest kept score64 of the scope (module, block, …) it was ranked in;
            None where that scope keeps nothing.
        smallest_kept: smallest magnitude among the kept weights, in effect the layer's magnitude cut;
            None where nothing is kept.
        flops_dense: multiply-adds of one forward pass at batch 1 before pruning.
        flops_nominal: the paper's count: `flops_dense` times the density of the *module*.
        flops: honest count: nonzero weights times the tokens that they are applied to.
        nm: "2:4", where of every 4 weights along the input 2 are kept; None without such groups.
    """

    name: str
    module: str
    stage: int | None
    block: int | None
    parameters: tuple[str, ...]
    weights: int
    kept: int
    nonzero: int
    threshold: float | None
    smallest_kept: float | None = None
    flops_dense: int | None = None
    flops_nominal: int | None = None
    flops: int | None = None
    tower: str = ""
    nm: str | None = None


@dataclass(frozen=True)
class ModuleReport(_Counts):
    """One module: sums over its `layers`. "aux" is never pruned, so its three FLOPs are equal.

    `threshold` is None unless the scope is "module" or "global"; of "aux"; or where nothing is kept.
    """

    name: str
    layers: int
    weights: int
    kept: int
    nonzero: int
    threshold: float | None
    flops_dense: int | None = None
    flops_nominal: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Report(_Counts):
    """A pruned model.

    Attributes:
        scope, normalize, sparsity: what was asked for.
        weights: parameters of the dense model, all of them: biases, norms and head too.
        kept: parameters that the masks leave; `removed_percent` is 1 - kept / weights, as in the
            paper's Table 1.
        nonzero: parameters that are not zero. Zeros of the dense model (biases of a fresh model)
            make it less than `kept`.
        modules: the prunable modules in their order, then "aux".
        layers: the prunable layers, module by module.
        model: class name of the model, None for a state dict.
        input_size: (channels, height, width) at which FLOPs were counted; (tokens,) of a model of text.
        flops_dense, flops_nominal, flops: multiply-adds at batch 1 (see `LayerReport`) of the whole
            model, what is never pruned included in full; None where they were not counted.
        flops_other: multiply-adds of no parameter (attention's products), part of the three above.
        notes: what the reader should know, for example why FLOPs are missing.
        asked: the budgets and limits that were given, as in `dimap.Budgets`.
        got: what is left of that which each budget bounds, in its unit; None where it was not counted.
    """

    scope: str
    normalize: str
    sparsity: dict[str, float]
    weights: int
    kept: int
    nonzero: int
    modules: tuple[ModuleReport, ...]
    layers: tuple[LayerReport, ...]
    model: str | None = None
    input_size: tuple[int, ...] | None = None
    flops_dense: int | None = None
    flops_nominal: int | None = None
    flops: int | None = None
    flops_other: int | None = None
    notes: tuple[str, ...] = ()
    asked: dict[str, Any] = field(default_factory=dict)
    got: dict[str, float | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, in a stable order (schema: see the module)."""
        head = {"schema": SCHEMA, "version": VERSION, "flops_unit": "multiply-adds, batch 1"}
        # Lists for tuples, so that a report read back compares equal to the one written.
        text = json.dumps(head | self._entries(), default=_Counts._entries)
        plain: dict[str, Any] = json.loads(text)
        return plain

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text; where `path` is given, also written there, complete or not at all.

        Raises:
            OSError: `path` cannot be written to; what was there before is still there.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        if path is not None:
            from .._files import replacing

            with replacing(Path(path), force=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`; derived figures are worked out afresh.

        Raises:
            ValueError: another schema or version, or a field is missing.
        """
        check_schema("report", data, SCHEMA, VERSION)
        return _build(
            cls,
            data,
            modules=tuple(_build(ModuleReport, module) for module in data.get("modules", ())),
            layers=tuple(_build(LayerReport, layer) for layer in data.get("layers", ())),
        )

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Report:
        """Read a report from a path, or from JSON text (a string that starts with "{")."""
        if not (isinstance(source, str) and source.lstrip().startswith("{")):
            source = Path(source).read_text(encoding="utf-8")
        return cls.from_dict(json.loads(source))

    def __str__(self) -> str:
        """The summary in plain text."""
        return plain(self)

    def parts(self) -> list[ModuleReport]:
        """What adds up to the whole: the modules, and "other", of no parameter; last the sum, "all"."""
        parts = list(self.modules)
        if self.flops_other is not None:  # products of activations read no weight
            parts.append(ModuleReport("other", 0, 0, 0, 0, None, *[self.flops_other] * 3))
        layers = sum(module.layers for module in self.modules)
        counts = {name: getattr(self, name) for name in _Counts.__annotations__}
        return [*parts, ModuleReport("all", layers, threshold=None, **counts)]

    def __rich__(self) -> Group:
        """Whole model and modules."""
        from rich.console import Group
        from rich.text import Text

        names = Column("module", lambda part: part.name, left=True)
        modules = table(columns(names, MODULES), self.parts())
        modules.rows[-1].style = "bold"
        modules.rows[-2].end_section = True
        lines = [Text(line) for line in summary_lines(self)]
        lines[0].stylize("bold")
        style = dict.fromkeys(self.notes, "yellow")
        notes = [Text(line, style=style.get(line, "dim")) for line in note_lines(self)]
        return Group(*lines, Fitting(modules, *LOST), *notes)

    def layer_table(self) -> Fitting:
        """For rich: one line for each prunable layer, block after block, with a bar of its density."""
        layers = sorted(self.layers, key=position)
        names = names_in_blocks(layers)

        def name(layer: LayerReport) -> str:
            name = names[layer.name]
            return name if len(name) <= NAME else ".." + name[2 - NAME :]

        def place(layer: LayerReport) -> str:
            numbers = (str(n) for n in (layer.stage, layer.block) if n is not None)
            return " ".join(filter(None, (layer.tower, ".".join(numbers))))

        block = Column("block", place)
        titles = (("N:M",) if any(layer.nm for layer in layers) else ()) + LAYERS
        made = table([block, *columns(Column("layer", name, left=True), titles)], layers)
        for line, (layer, after) in zip(made.rows, pairwise(layers), strict=False):
            line.end_section = layer.stage != after.stage
        return Fitting(made, *LOST)

    def print(self, *, layers: bool = False) -> None:
        """Print the summary, and one line for each layer where asked."""
        console = make_console()
        console.print(self)
        if layers:
            console.print(self.layer_table())


def check_schema(what: str, data: Mapping[str, Any], schema: str, version: int) -> None:
    """Refuse JSON of another schema or version. what: it is, for the error."""
    found = (data.get("schema"), data.get("version"))
    if found != (schema, version):
        raise ValueError(
            f"{what} must have schema {schema!r} and version {version}, "
            f"got {found[0]!r} and {found[1]!r}"
        )


def _build(kind: type[_Built], data: Mapping[str, Any], **ready: Any) -> _Built:
    """`kind` from the entries of `data` that it has a field for; lists become tuples."""
    values: dict[str, Any] = {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name in data:
            value = ready.get(each.name, data[each.name])
            values[each.name] = tuple(value) if isinstance(value, list) else value
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} must have a field {each.name!r}, got {list(data)}")
    return kind(**values)


# What the tables say


def summary_lines(report: Report) -> list[str]:
    """What was asked for, and what came of it in all."""
    ratios = dict.fromkeys(report.sparsity.values())
    asked = [f"{ratio:g}" for ratio in ratios]
    if len(ratios) > 1:
        asked = [f"{module} {ratio:g}" for module, ratio in report.sparsity.items()]
    groups = in_layers([layer.nm for layer in report.layers])
    lines = [
        *([groups] if groups else []),
        f"sparsity {', '.join(asked)}; scope {report.scope}; normalize {report.normalize}",
        *(_budget_line(name, report.asked[name], got) for name, got in report.got.items()),
        f"parameters     {report.weights:,} -> {report.kept:,}, "
        f"{report.removed_percent:.2f} % removed",
    ]
    if zeros := report.kept - report.nonzero:
        lines.append(f"not zero       {report.nonzero:,}; {zeros:,} that are kept were zero before")
    for name, flops, percent in (
        ("FLOPs         ", report.flops, report.flops_removed_percent),
        ("FLOPs, nominal", report.flops_nominal, report.flops_nominal_removed_percent),
    ):
        if percent is not None:
            lines.append(
                f"{name} {short(report.flops_dense)} -> {short(flops)}, {percent:.2f} % removed"
            )
    return lines


def _budget_line(name: str, asked: float, got: float | None) -> str:
    said = [f"{asked:,} bytes" if name == "size" else f"{100 * asked:g} %", "not counted"]
    if got is not None:
        said[1] = f"{got:,} bytes" if name == "size" else f"{100 * got:.4f} %"
    return f"{name.replace('_', ' '):<14} asked for at most {said[0]}, got {said[1]}"


def note_lines(report: Report) -> list[str]:
    """What FLOPs are, and the report's notes."""
    if report.input_size is None:
        return list(report.notes)
    size = " x ".join(map(str, report.input_size))
    one = f"one {size} input" if len(report.input_size) > 1 else f"{size} tokens"
    return [
        f"FLOPs are multiply-adds of {one}. before: the dense model;",
        "FLOPs: nonzero weights x tokens; nominal: the module's ratio, in all its layers.",
        *(
            ["other: what multiplies no weights, as attention's products"]
            if report.flops_other
            else []
        ),
        *report.notes,
    ]


MODULES = ("layers", "weights", "kept", "removed", "threshold", "before", "FLOPs", "nominal")
LAYERS = ("weights", "density", "", "min |w|", "FLOPs")
# Where there is no room for all of them, those that go, one after the other.
LOST = ("", "threshold", "min |w|", "nominal", "layers", "before", "kept", "FLOPs", "weights")


def columns(
    names: Column, titles: Sequence[str], count: Callable[[int], str] = short, digits: int = 1
) -> list[Column]:
    """What a table says of layers or of `Report.parts`, of which "other" has no weights.

    names: the first column. titles: of the others. count: how numbers of weights are written.
    digits: of how much is removed.
    """
    say: dict[str, Callable[[Any], str | float]] = {
        "layers": lambda part: part.layers and str(part.layers),
        "weights": lambda part: part.weights and count(part.weights),
        "kept": lambda part: part.weights and count(part.kept),
        "removed": lambda part: part.weights and f"{part.removed_percent:.{digits}f} %",
        "density": lambda part: part.weights and f"{100 * part.density:.1f} %",
        "": lambda part: part.weights and part.density,
        "threshold": lambda part: part.removed and tiny(part.threshold),
        "min |w|": lambda part: tiny(getattr(part, "smallest_kept", None)),
        "module": lambda part: getattr(part, "module", ""),
        "N:M": lambda part: getattr(part, "nm", None) or "",
        "before": lambda part: short(part.flops_dense),
        "FLOPs": lambda part: short(part.flops),
        "nominal": lambda part: short(part.flops_nominal),
    }
    return [names, *(Column(title, say[title]) for title in titles)]
