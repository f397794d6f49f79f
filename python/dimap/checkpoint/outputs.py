"""The outputs of a pruning: created before the work by the first rank, filled by all, and then renamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .._files import SUFFIX, naming, replacing
from ..distributed.ranks import Ranks
from ..groups.plan import Plan
from ..plots import report_output
from ..plots.report_folder import ReportOutput
from .base import Checkpoint


@dataclass
class Outputs:
    """What is filled, until it is renamed. home: OUT. masks: None where nobody needs them."""

    files: list[Path]
    home: Path
    masks: Path | None
    report: ReportOutput | None


@contextmanager
def creating_outputs(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    small: Mapping[str, Path],
    ranks: Ranks,
    *,
    force: bool,
    all_copies: bool,
) -> Iterator[Outputs]:
    """The outputs, which the first rank creates: OUT, and the small files, "masks" and "report".

    It does so before the work, so that one that cannot be written is told at once. What is begun last
    is completed first: OUT before the small files.
    """
    places = {"OUT": out} if checkpoint.place is None else {"IN": checkpoint.place, "OUT": out}
    for kind, path in small.items():
        here = path.resolve()
        for name, other in places.items():
            if other.resolve() in (here, *here.parents):
                raise ValueError(f"{kind} must lie apart from {name}, got {path}")
        places[kind] = path
    ranks.outputs(out, *small.values())
    report = None
    created: tuple[list[Path], Path | None] | None = None
    with ExitStack() as stack:
        if ranks.rank == 0:
            if "report" in small:
                output = report_output(small["report"], plan.modules, force=force)
                report = stack.enter_context(output)
                report.before(checkpoint)
            masks = None
            if "masks" in small:
                masks = stack.enter_context(replacing(small["masks"], force=force)).absolute()
            files = stack.enter_context(checkpoint.creating(out, force=force))
            if masks is None and all_copies and checkpoint.others:
                masks = files[0].with_name(f".masks{SUFFIX}").absolute()
                masks.touch()
            created = [file.absolute() for file in files], masks
        stack.enter_context(ranks.stopping_together())  # inside of what removes the outputs
        created = ranks.gather(created)[0]
        assert created is not None
        files, masks = created
        if masks is not None and "masks" in small:
            stack.enter_context(naming(small["masks"], masks))
        home = files[0].parent if checkpoint.is_folder else files[0]
        stack.enter_context(naming(out, home))
        yield Outputs(files, home, masks, report)
        ranks.gather(None)  # nothing is renamed before all ranks are here
