"""Gradual pruning: the sparsity rises while the model trains, in place of one shot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .budgets import Budgets
from .groups import choose
from .groups.known import bare
from .groups.nm import NM
from .groups.plan import check_choice
from .holding import Holding, hold_masks, is_flat, unwrap, whole_weights
from .masks import fit_masks
from .methods import METHODS, Method
from .pruning import select
from .saliency import magnitude

__all__ = ["CubicSchedule", "GradualPruning", "Schedule"]


class Schedule(ABC):
    """How much is pruned, and when, in optimizer steps: derive your own from it."""

    @abstractmethod
    def sparsity(self, step: int) -> Any:
        """What `dimap.select` takes after `step` optimizer steps: a number, or one for each module."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether weights are pruned after `step` optimizer steps."""


@dataclass(frozen=True)
class CubicSchedule(Schedule):
    """The cubic schedule s(t) = final + (initial − final) · (1 − (t − begin) / (end − begin))³.

    It removes much while there is much to spare and little near the end.

    final: the sparsity from step `end` on, in [0, 1].
    begin, end: optimizer steps, 0 <= begin < end. Before `begin` the sparsity is `initial`.
    every: steps from one pruning to the next; `begin` and `end` are always among them.
    initial: in [0, final].

    Source: Zhu and Gupta, "To prune, or not to prune", ICLR 2018 workshop (arXiv 1710.01878), Eq. 1.
    """

    final: float
    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in [0, 1], got {self.final}")
        if not 0 <= self.initial <= self.final:
            raise ValueError(f"initial must be in [0, final = {self.final}], got {self.initial}")
        if self.begin < 0:
            raise ValueError(f"begin must be at least 0, got {self.begin}")
        if self.end <= self.begin:
            raise ValueError(f"end must be greater than begin = {self.begin}, got {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")

    def sparsity(self, step: int) -> float:
        """The sparsity after `step` optimizer steps."""
        done = min(max(step - self.begin, 0) / (self.end - self.begin), 1.0)
        return self.final + (self.initial - self.final) * (1 - done) ** 3

    def due(self, step: int) -> bool:
        """Whether weights are pruned after `step` optimizer steps."""
        inside = self.begin <= step < self.end
        return step == self.end or (inside and (step - self.begin) % self.every == 0)


@dataclass(frozen=True)
class _Once(Schedule):
    """All that is pruned is pruned before the first step; None prunes nothing."""

    final: float | Mapping[str, float] | None

    def sparsity(self, step: int) -> Any:
        return self.final

    def due(self, step: int) -> bool:
        return step == 0 and self.final is not None


class GradualPruning:
    """Prunes a model by a schedule while it trains, and holds what is pruned at zero:

        gradual = GradualPruning(model, optimizer, CubicSchedule(0.8, begin=100, end=900, every=50))
        for x, y in loader:
            ...
            optimizer.step()
            gradual.step()

    model, optimizer, gradients: as in `dimap.hold_masks`.
    schedule: a `CubicSchedule` or a `Schedule` of your own; a number (or one for each module)
        prunes once, at the start; None never.
    masks: held from the start; what they drop stays dropped.
    steps: of the optimizer that are done already: then nothing is pruned at the start.
    options: `method`, `scope`, `nm` (auto), `min_keep`, `limits`, `data`, … of `dimap.select`, for every
        pruning. `data` is read at each: a list, not a generator.

    What is pruned stays pruned. A compiled or data-parallel model is pruned as the plain one in it, and
    a sharded one as its whole.

    Raises ValueError for options that say a sparsity themselves, beside a schedule: N:M, or a budget.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        schedule: Schedule | float | Mapping[str, float] | None,
        *,
        masks: Mapping[str, Tensor] | None = None,
        steps: int = 0,
        gradients: bool | Literal["early"] = True,
        **options: Any,
    ) -> None:
        self.schedule = schedule if isinstance(schedule, Schedule) else _Once(schedule)
        self.steps = steps  # so far
        self.sparsity: Any = 0.0  # now
        given = {name: options.pop(name, None) for name in ("patterns", "family", "ignore")}
        options["patterns"] = choose(**given)
        _check(options, sought=isinstance(self.schedule, _Once) and schedule is not None)
        self._model, self._optimizer, self._options = unwrap(model), optimizer, options
        self._gradients = gradients
        self.holding: Holding | None = None  # what holds the masks now
        self._masks: Mapping[str, Tensor] = {}
        if masks:
            self._hold(masks)
        if steps == 0 and self.schedule.due(0):
            self.prune(self.schedule.sparsity(0))

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask, True = kept; none before the first pruning."""
        return MappingProxyType(self._masks)

    def step(self) -> bool:
        """Count one optimizer step; prune, and return True, where the schedule says so."""
        self.steps += 1
        if not self.schedule.due(self.steps):
            return False
        self.prune(self.schedule.sparsity(self.steps))
        return True

    @torch.no_grad()
    def prune(self, sparsity: float | Mapping[str, float]) -> None:
        """Prune to `sparsity` now, and hold that."""
        options, before = self._options, {}
        with whole_weights(self._model) as weights:
            if self._masks:
                before = fit_masks(self._masks, weights)
                before = {n: mask.to(weights[n].device) for n, mask in before.items()}
                method = METHODS[options.get("method", "dimap")]
                options = options | {
                    "method": "dimap",  # one that needs data has read them
                    "data": None,
                    "scope": options.get("scope") or method.scope,
                    "normalize": options.get("normalize")
                    or (method.normalize if options.get("saliency") is None else "scope"),
                    "saliency": self._saliency(method, before),
                }
            found = select(self._model, sparsity, **options)
        masks = {bare(name): mask for name, mask in found.items()}
        self._hold(before | {n: mask & before.get(n, mask) for n, mask in masks.items()})
        self.sparsity = sparsity

    def _hold(self, masks: Mapping[str, Tensor]) -> None:
        self.remove()
        self.holding = hold_masks(self._model, masks, self._optimizer, gradients=self._gradients)
        # Those of flat parameters are of this rank alone.
        self._masks = masks if is_flat(self._model) else self.holding.masks

    def _saliency(self, method: Method, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The saliency of what is left; what is pruned ranks below a weight left with saliency 0."""
        options = self._options
        patterns = options.get("patterns")
        if (given := options.get("saliency")) is not None:
            values = {name: value.float() for name, value in given.items()}
        elif method.saliency is not None:
            data, loss = options["data"], options.get("loss")
            values = method.saliency(self._model, data, loss, patterns=patterns)
        else:
            values = magnitude(self._model, patterns=patterns)
        least = 2.0**-149
        values = {name: value.clamp_min(least) for name, value in values.items()}
        for name, value in values.items():
            if bare(name) in masks:
                value.masked_fill_(~masks[bare(name)], 0)
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the model's and the optimizer's."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return {"steps": self.steps, "sparsity": self.sparsity, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; load the model and the optimizer before."""
        self.remove()
        if state["masks"]:
            self._hold(state["masks"])
        self.steps, self.sparsity = state["steps"], state["sparsity"]

    def remove(self) -> None:
        """Let go of the masks; the weights stay as they are."""
        if self.holding is not None:
            self.holding.remove()
            self.holding, self._masks = None, {}


def _check(options: Mapping[str, Any], sought: bool) -> None:
    """Refuse, before the training, options of `select` that no pruning by a schedule can have.

    sought: whether the one pruning may have a budget to seek its sparsity by.
    """
    taken = signature(select).parameters
    budgets = {name: value for name, value in options.items() if name not in taken}
    budget = Budgets.of("GradualPruning", budgets)
    method = options.get("method", "dimap")
    check_choice("method", method, tuple(METHODS))
    groups = NM.parse(nm := options.get("nm"))
    if groups is not None and groups.n is not None:
        raise ValueError(
            f"nm must be auto or auto:M, where a schedule says how much is pruned, got {nm!r}: give "
            f"masks=dimap.select(model, nm={nm!r}) and no schedule to hold it"
        )
    if budget.asked and not sought:
        raise ValueError(
            f"{' and '.join(budget.asked)} must be left out, where a schedule says how much is pruned: "
            "give masks=dimap.select(model, ...) with the budget and no schedule to hold it"
        )
    if groups is not None or (options.get("scope") or METHODS[method].scope) == "row":
        budget.refuse("nm" if groups is not None else "row")
