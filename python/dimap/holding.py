"""Masks that hold: pruned weights stay exactly zero while a model is trained.

    pruning = dimap.prune(model, 0.55)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    with dimap.hold_masks(model, pruning.masks, optimizer):
        train(model, optimizer)          # any loop; nothing in it changes

The hooks are the optimizer's: the model has none, and its parameters are its own. State dicts have
the dense model's names, and copies, exports, compiled and distributed models are what they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import is_sharded
from .groups.known import bare
from .masks import fit_masks, zero_dropped

# Where optimizers that wrap another one keep it: timm's Lookahead, accelerate, ZeroRedundancy.
WRAPPED = ("_base_optimizer", "optimizer", "optim")


class Holding(AbstractContextManager["Holding"]):
    """What `hold_masks` returns; a context manager that lets go of the masks at its end."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        optimizers: Sequence[Optimizer],
        *,
        gradients: bool | Literal["early"],
    ) -> None:
        self._masks = {name: _placed(mask, parameters[name]) for name, mask in masks.items()}
        self._held = {parameters[name]: mask for name, mask in self._masks.items()}
        self._optimizers = [(inner, _chain(inner)[-1]) for inner in optimizers]
        self._handles: list[Any] = []
        self.zero_weights()
        self.zero_state()
        for outer, inner in self._optimizers:
            if gradients:
                self._handles.append(inner.register_step_pre_hook(lambda *_: self.zero_gradients()))
            self._handles.append(inner.register_step_post_hook(lambda *_: self.zero_weights()))
            # Of the outermost, whose state is loaded; a wrapper may lack the means.
            if hasattr(outer, "_optimizer_load_state_dict_post_hooks"):
                handle = outer.register_load_state_dict_post_hook(self._after_load)
                self._handles.append(handle)
        for p in self._held if gradients == "early" else ():
            if p.requires_grad:
                handle = p.register_post_accumulate_grad_hook(lambda p: self._zero_gradients([p]))
                self._handles.append(handle)

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Parameter name -> bool mask, True = kept; not to be changed.

        Of a DTensor it is one with the same placements; of a parameter of FullyShardedDataParallel
        the part of this rank, [n].
        """
        return MappingProxyType(self._masks)

    def zero_weights(self) -> None:
        """Set pruned weights to +0 now: after loading other weights into the model, say."""
        zero_dropped(self._pairs(self._held))

    def zero_gradients(self) -> None:
        """Set the gradients of pruned weights to +0 now.

        Each step begins with it unless ``gradients=False``. Call it before the gradients' norm is
        taken, so that clipping sees only the gradients that are used; with ``gradients="early"`` no
        call is needed.
        """
        self._zero_gradients(self._held)

    def _zero_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        pairs = self._pairs(parameters)
        zero_dropped((p.grad, m) for p, m in pairs if p.grad is not None and _dense(p.grad))

    def zero_state(self) -> None:
        """Set what the optimizer remembers of pruned weights (momentum, say) to +0 now."""
        states = {id(o): o for outer, _ in self._optimizers for o in _chain(outer)}
        for optimizer in states.values():
            mine = [p for p in getattr(optimizer, "state", {}) if p in self._held]
            zero_dropped(
                (value, mask)
                for p, mask in self._pairs(mine)
                for value in optimizer.state[p].values()
                if _dense(value) and value.shape == p.shape and value.is_floating_point()
            )

    def remove(self) -> None:
        """Let go: the weights are as they are, and free from the next step on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _pairs(self, parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with their masks, on the device where each parameter is by now."""
        for p in parameters:
            if self._held[p].device != p.device:
                self._held[p] = self._held[p].to(p.device)
        return [(p, self._held[p]) for p in parameters]

    def _after_load(self, *_: object) -> None:
        self.zero_weights()
        self.zero_state()


def hold_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    gradients: bool | Literal["early"] = True,
) -> Holding:
    """Keep the weights that `masks` drop at exactly +0 after every step of `optimizer`.

    model: the model that is trained, plain, compiled, in DistributedDataParallel, or sharded: its
        parameters DTensors (FSDP2, tensor parallelism), or in FullyShardedDataParallel. All ranks
        call it together.
    masks: parameter name -> bool tensor of its whole shape, True = kept; the name may be of another
        spelling of the model, as in `dimap.apply_masks`. Of a sharded model they are those that
        `dimap.select` made of it, placed as the parameters are, or whole ones that are the same on
        every rank.
    optimizer: one, or several that share the model. Any whose steps run hooks, as all of
        torch.optim and timm.optim do; fused, foreach, within GradScaler.
    gradients: also zero the gradients of pruned weights before each step, so that the optimizer's
        memory of them (momentum, exp_avg) is zero as well. "early": as soon as they have been added
        up, for a loop of somebody else's that takes their norm; by hooks of the parameters, which the
        flat ones of FullyShardedDataParallel do not run.

    Pruned weights are zeroed at once, and so is what the optimizer remembers of them; again when a
    state dict is loaded into the optimizer. NaN and infinity become zero too, and no zero is
    negative. Costs two passes over the masked weights a step.

    Returns a handle with `remove()`, which also is a context manager.

    Raises TypeError for wrong types and for an optimizer without hooks; ValueError where a mask
    names no parameter of the model or has another shape, where two names of one parameter have
    different masks, and where no optimizer has a masked parameter that is trained. All is checked
    before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(optimizers, Sequence) or not all(
        isinstance(each, Optimizer) for each in optimizers
    ):
        raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
    for each in optimizers:
        _chain(each)
    parameters = _named(model)
    masks = _through_flat(model, masks) if is_flat(model) else fit_masks(masks, parameters)
    seen: dict[nn.Parameter, str] = {}
    for name, mask in masks.items():
        first = seen.setdefault(parameters[name], name)
        if first != name and not torch.equal(mask, masks[first].to(mask.device)):
            raise ValueError(f"{first} and {name} are one parameter and must have one mask")
    trained = {p for each in optimizers for group in each.param_groups for p in group["params"]}
    for name in masks:
        if parameters[name].requires_grad and parameters[name] not in trained:
            raise ValueError(
                f"optimizer must have every masked parameter that is trained, got none for {name}: "
                "was it made for another copy of the model?"
            )
    return Holding(parameters, masks, optimizers, gradients=gradients)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    named = unwrap(model).named_parameters(remove_duplicate=False)
    return {bare(name): parameter for name, parameter in named}


def _placed(mask: Tensor, parameter: Tensor) -> Tensor:
    """A mask on the device, or over the ranks, where its parameter is."""
    if is_sharded((parameter, mask)):
        from .distributed import _dtensor

        return _dtensor.placed(mask, parameter)
    return mask.to(parameter.device)


def is_flat(model: nn.Module) -> bool:
    """Whether a part of the model is in FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not loaded: then there is none
    return fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()
    )


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The model's parameters by name; in FullyShardedDataParallel every rank has all of them here."""
    if not is_flat(model):
        yield _named(model)
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model):
        yield _named(model)


def _through_flat(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of what this rank has of flat parameters, by name of those.

    Masks go the way of the weights: for a moment they are the weights of the whole model, which
    FullyShardedDataParallel then shards. So it needs the memory of the whole model once.
    """
    here = {name: p for name, p in _named(model).items() if p.is_floating_point()}
    before = {name: parameter.detach().clone() for name, parameter in here.items()}
    with torch.no_grad():
        try:
            for parameter in here.values():
                parameter.fill_(1)
            with whole_weights(model) as whole:
                fitted = fit_masks(masks, whole)
                for name, mask in fitted.items():
                    whole[name].copy_(mask)
            found = {name: parameter != 0 for name, parameter in here.items()}
        finally:
            for name, parameter in here.items():
                parameter.copy_(before[name])
    flat = {name for name in found if name not in whole}  # of the parameters of a unit, in one
    return {name: mask for name, mask in found.items() if name in fitted or name in flat}


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model in one that is compiled or data-parallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _chain(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer, what it wraps, and so on to the one whose steps run hooks."""
    chain = [optimizer]
    while not getattr(type(chain[-1]).step, "hooked", False):
        inner = next((o for a in WRAPPED if (o := getattr(chain[-1], a, None)) is not None), None)
        if not isinstance(inner, Optimizer):
            raise TypeError(
                "optimizer must run its step hooks, as those of torch.optim do, "
                f"got {type(optimizer).__name__}, whose step runs none"
            )
        chain.append(inner)
    return chain


def _dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided
