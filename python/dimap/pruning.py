"""Score, select and prune a whole model: names in, masks out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import ops
from .distributed._sharded import check_whole, is_sharded
from .groups import Layer, Patterns
from .groups._plan import Model, Normalize, Plan, check_choice, parameters_of, renamed
from .groups._scopes import Scope
from .methods import Ranking, rank
from .saliency import Batches, Loss

if TYPE_CHECKING:
    from .report import Report

__all__ = ["Normalize", "Pruning", "Scope", "prune", "score", "select"]


def score(
    model: Model, *, normalize: Normalize = "layer", patterns: Patterns | None = None
) -> dict[str, Tensor]:
    """Score every prunable weight of a model (Eq. 10 of the DIMAP paper).

    model: an nn.Module or a state dict; float32, bfloat16 or float16 weights on one device.
    normalize: where the squares are summed: over a layer (the paper), or over the layers of one
        module that stand in the same block, in the same stage, or all of them.
    patterns: see `find_modules`.

    Returns parameter name -> float32 tensor of the parameter's shape.
    """
    check_choice("normalize", normalize, ("layer", "block", "stage", "module"))
    plan = Plan.of(model, "module", normalize, patterns)
    check_whole(plan.tensors, "score")
    with renamed(plan.names):
        scores = ops.score(plan.tensors, plan.layers)
    return dict(zip(plan.names, scores, strict=True))


def select(
    model: Model,
    sparsity: float | Mapping[str, float],
    *,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    saliency: Mapping[str, Tensor] | None = None,
    data: Batches | None = None,
    loss: Loss | None = None,
    patterns: Patterns | None = None,
) -> dict[str, Tensor]:
    """Return the masks that prune a model, without changing it.

    sparsity: the share of weights to drop, in [0, 1]: one number, or one for each module by name.
    method: a name of `dimap.methods.METHODS`, which says the saliency, and the scope and the
        normalisation where they are not given: "dimap", "lamp", "uniform", "global_magnitude",
        "taylor", "snip".
    scope: where one threshold holds: "module" (the paper), "global" (one for the network: LAMP),
        "layer" (the same ratio in every layer: uniform magnitude; `normalize` changes nothing),
        "type" (a module with FC1 and FC2 apart), "block" or "stage" (all modules of it together).
    normalize: where the squares are summed, within the scope: over "layer" (the paper), the
        module's part of a "block" or "stage", "module", or the whole "scope". The last ranks by plain
        magnitude. normalize="module" with scope="global" lets whole modules compete: sorted,
        normalised and cut together.
    saliency: parameter name -> tensor to rank by in place of the magnitudes, for every prunable
        parameter: its shape and device, float32, bfloat16 or float16, finite, not negative. Ranked
        as it is (normalize="scope") unless `normalize` is given: then by s²/S(s), as weights are.
        What it says of other parameters is left out.
    data, loss: batches and loss for the methods that need them, as in `dimap.saliency.taylor`.
    patterns: see `find_modules`.

    A model may be sharded: parameters that are DTensors (FSDP2). Then all processes of its mesh call
    this together, no weight is gathered, and the masks are DTensors with the same placements; the
    order in which ties are kept is that of the whole tensors.

    Returns parameter name -> bool tensor, True where the weight is kept. In each scope of N weights
    exactly ``N - round(sparsity * N)`` are kept; ties go to the earlier parameter, then to the lower
    flat index. Parameters of "aux" are not in it.
    """
    _check_ranked(model, saliency, data)
    ranking = rank(
        model,
        sparsity,
        method=method,
        scope=scope,
        normalize=normalize,
        saliency=saliency,
        data=data,
        loss=loss,
        patterns=patterns,
    )
    plan = ranking.plan
    if is_sharded(plan.tensors):
        masks, _ = _select_sharded(ranking)
    else:
        with ranking.naming():
            masks = ops.select(ranking.tensors, plan.layers, plan.scopes, ranking.keep)
    return dict(zip(plan.names, masks, strict=True))


def prune(
    model: Model,
    sparsity: float | Mapping[str, float],
    *,
    method: str = "dimap",
    scope: Scope | None = None,
    normalize: Normalize | None = None,
    saliency: Mapping[str, Tensor] | None = None,
    data: Batches | None = None,
    loss: Loss | None = None,
    patterns: Patterns | None = None,
) -> Pruning:
    """Prune a model in place: what `select` drops becomes zero. Arguments as in `select`.

    Nothing is changed when an error is raised.
    """
    _check_ranked(model, saliency, data)
    ranking = rank(
        model,
        sparsity,
        method=method,
        scope=scope,
        normalize=normalize,
        saliency=saliency,
        data=data,
        loss=loss,
        patterns=patterns,
    )
    plan = ranking.plan
    if is_sharded(plan.tensors):
        from .distributed import _dtensor

        masks, thresholds = _select_sharded(ranking)
        _dtensor.apply_(plan.tensors, masks)
    else:
        with ranking.naming():
            masks, thresholds = ops.select_cuts(
                ranking.tensors, plan.layers, plan.scopes, ranking.keep
            )
        with renamed(plan.names):
            ops.apply_(plan.tensors, masks)
    return Pruning(
        masks=dict(zip(plan.names, masks, strict=True)),
        modules=plan.modules,
        thresholds=dict(zip(plan.scope_names, thresholds.tolist(), strict=True)),
        scope=ranking.scope,
        normalize=ranking.normalize,
        sparsity=plan.ratios(sparsity),
        parameters=parameters_of(model),
        saliency=ranking.saliency,
    )


@dataclass
class Pruning:
    """What was pruned.

    masks: parameter name -> bool tensor, True where the weight is kept.
    modules: what `find_modules` gave, "aux" included.
    thresholds: the smallest kept score64 of each scope (of the saliency, where there is one), under
        the scope's name: "mlp", "global", "layers.0.blocks.0.attn.qkv", "mlp.1", "stage 0 block 1",
        "stage 0"; NaN where nothing is kept.
    scope, normalize: what the ranking used, given or the method's.
    sparsity: module name -> the ratio asked for.
    parameters: every parameter of the model, "aux" included: the model's own tensors.
    saliency: what was ranked: "magnitude", "given", or the method's name ("taylor", "snip").
    """

    masks: dict[str, Tensor]
    modules: dict[str, list[Layer]]
    thresholds: dict[str, float]
    scope: Scope
    normalize: Normalize
    sparsity: dict[str, float]
    parameters: dict[str, Tensor] = field(repr=False)
    saliency: str = "magnitude"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {name: tuple(p.shape) for name, p in self.parameters.items()}

    @property
    def nonzero(self) -> dict[str, int]:
        """How many weights of every parameter are not zero now."""
        check_whole(self.parameters.values(), "nonzero")
        return {name: count_nonzero(p) for name, p in self.parameters.items()}

    def report(
        self, model: nn.Module | None = None, input_size: int | Sequence[int] | None = None
    ) -> Report:
        """Tables of what is left; with `model`, FLOPs too (see `dimap.report.build_report`)."""
        from .report import build_report

        return build_report(self, model, input_size)

    def save_masks(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, one bit a weight (see `dimap.load_masks`)."""
        from .masks import save_masks

        settings: dict[str, str] = {"scope": self.scope, "normalize": self.normalize}
        if self.saliency != "magnitude":
            settings["saliency"] = self.saliency
        settings |= {f"sparsity.{name}": repr(s) for name, s in self.sparsity.items()}
        save_masks(path, self.masks, settings)


def _check_ranked(model: Model, saliency: object, data: object) -> None:
    """Only magnitudes are ranked where they lie on several processes."""
    given: object = model  # callers are not bound by the annotation; another check refuses the rest
    if isinstance(given, (nn.Module, Mapping)) and not (saliency is None and data is None):
        check_whole(parameters_of(model).values(), "data" if saliency is None else "saliency")


def _select_sharded(ranking: Ranking) -> tuple[list[Tensor], Tensor]:
    from .distributed import _dtensor

    plan = ranking.plan
    return _dtensor.select_cuts(plan.names, plan.tensors, plan.layers, plan.scopes, ranking.keep)


def count_nonzero(tensor: Tensor) -> int:
    """How many values are not zero."""
    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch cannot count float8
        tensor = tensor.float()
    return int(tensor.count_nonzero())
