"""timm models by name: their weights, or only their build. Imports timm and torch when needed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ._errors import first_line, near, need
from ._hub import reaching_hub
from .groups.identity import same_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = "timm.models."


def create(name: str, *, pretrained: bool) -> nn.Module:
    """A timm model with pretrained weights, or with fresh ones (seed 0).

    Raises ModuleNotFoundError without timm, ValueError for a name that timm does not know, OSError
    where the weights are not in the hub's cache and cannot be downloaded.
    """
    timm = need("timm", "timm models need")
    _check_known(timm, name)
    if not pretrained:
        return seeded(0, lambda: timm.create_model(name))
    try:
        with reaching_hub("timm models need"):
            return cast("nn.Module", timm.create_model(name, pretrained=True))
    except Exception as error:  # the hub's client has its own kinds; timm raises RuntimeError
        reason = first_line(error).removesuffix(".")
        raise OSError(
            f"the pretrained weights of timm:{name} could not be loaded: {reason}. "
            "For a dry run with random weights there is --random-init."
        ) from error


def with_weights(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """The model with the parameters in `state`; what `state` lacks stays on the meta device.

    architecture: a name that timm registers, or a class "timm.models.FILE.CLASS".
    config: keyword arguments for it. A classifier of another size (a fine-tuned model's) is built
        as `state` has it.

    Raises ModuleNotFoundError without timm, ValueError where timm cannot build the model, or where
    a name or shape in `state` is not the model's.
    """
    config, state = _fitted(architecture, config, state)
    model = _skeleton(architecture, config)
    claim = f"the weights must be those of timm's {architecture}"
    _check_fit(claim, dict(model.named_parameters()), state, state)
    model.requires_grad_(False).load_state_dict(state, strict=False, assign=True)
    return model


def with_all_weights(
    architecture: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    name: str,
    seed: int,
) -> nn.Module:
    """The model in float32 on the CPU, ready to be trained, with all of its tensors from `state`.

    architecture, config: as in `with_weights`.
    name: what holds `state`, for errors. seed: for what a model draws when it is built.

    Raises as `with_weights`, and ValueError where `state` lacks a tensor of the model.
    """
    config, state = _fitted(architecture, config, state)
    model = seeded(seed, lambda: _build(architecture, config)).float()
    wanted = model.state_dict()
    claim = f"{name} must hold the weights of timm's {architecture}"
    _check_fit(claim, wanted, state, [*wanted, *state])
    model.load_state_dict(dict(state))
    return model


def _fitted(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The tensors under timm's names, where theirs differ by a prefix, wrappers or another library; the
    arguments with as many classes as their classifier tells apart."""
    model = _skeleton(architecture, config)
    shapes, own = ({n: tuple(t.shape) for n, t in x.items()} for x in (state, model.state_dict()))
    with suppress(ValueError):  # the check of what fits will say what does not
        pairs = same_weights(shapes, own)
        if all(len(given) == len(name) == 1 for given, name in pairs):
            state = {name[0]: state[given[0]] for given, name in pairs}
    head = getattr(model, "pretrained_cfg", {}).get("classifier")
    weight = state.get(f"{head}.weight")
    if (
        weight is not None
        and weight.ndim
        and weight.shape[0] != getattr(model, "num_classes", None)
    ):
        config = {**config, "num_classes": weight.shape[0]}
    return config, state


def _check_fit(
    claim: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], names: Iterable[str]
) -> None:
    for name in names:
        want, have = (
            tuple(t[name].shape) if name in t else "no such tensor" for t in (wanted, got)
        )
        if want != have:
            raise ValueError(f"{claim}, which has {want} for {name}, got {have}")


def seeded(seed: int, build: Any) -> nn.Module:
    """What `build` gives with this seed; the seed of the program stays as it is."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("nn.Module", build())


def _skeleton(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device: names and shapes without weights."""
    import torch

    with torch.device("meta"):
        return _build(architecture, config)


def _build(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    timm = need("timm", "timm models need")
    build: Any = _class(architecture)
    if build is None:
        _check_known(timm, architecture)
        build = partial(timm.create_model, architecture)
    try:
        return cast("nn.Module", build(**config))
    except Exception as error:
        raise ValueError(
            f"timm must be able to build {architecture} with {dict(config)}, got: {error}"
        ) from error


def described(path: str, metadata: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """Architecture and arguments that a checkpoint names for itself, or None.

    They stand in the safetensors metadata ("architecture", and "config" as JSON), or in the
    config.json of a timm folder ("architecture", "num_classes", "model_args").
    """
    if name := metadata.get("architecture"):
        return name, _object(metadata.get("config", "{}"))
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    config = _object(file.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(name := config.get("architecture"), str):
        return None
    arguments = config.get("model_args")
    arguments = dict(arguments) if isinstance(arguments, dict) else {}
    if isinstance(config.get("num_classes"), int):
        arguments.setdefault("num_classes", config["num_classes"])
    return name, arguments


def _class(path: str) -> type[nn.Module] | None:
    """A model class by its full name. The name comes from a file, so only timm's own count."""
    from torch import nn

    module, _, name = path.rpartition(".")
    if not module.startswith(CLASSES):
        return None
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"timm must have the model {path}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path} must be a model class of timm")
    return found


def _check_known(timm: Any, name: str) -> None:
    if timm.is_model(name.split(".")[0]):
        return
    hint = near(name.split(".")[0], timm.list_models())
    raise ValueError(f"timm must know the model, got {name!r}{hint}")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
