"""timm models by name: their weights, or only their build. Imports timm when it is needed."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

CLASSES = "timm.models."


def create(name: str, *, pretrained: bool) -> nn.Module:
    """A timm model with pretrained weights, or with fresh ones (seed 0).

    Raises ModuleNotFoundError without timm, ValueError for a name that timm does not know, OSError
    where the weights can be had neither from the hub nor from its cache.
    """
    if pretrained and not _hub_resolves():
        # Without this the hub's client retries for most of a minute; its cache still works.
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    timm = _import()
    _check_known(timm, name)
    if not pretrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cast(nn.Module, timm.create_model(name))
    try:
        return cast(nn.Module, timm.create_model(name, pretrained=True))
    except Exception as error:  # the hub's client has its own kinds; timm raises RuntimeError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(
            f"the pretrained weights of timm:{name} could not be had: {reason} "
            "For a dry run with random weights there is --random-init."
        ) from error


def skeleton(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device: names and shapes without weights.

    architecture: a name that timm registers, or a class "timm.models.FILE.CLASS".
    config: keyword arguments for it.

    Raises ModuleNotFoundError without timm, ValueError where timm cannot build it.
    """
    with torch.device("meta"):
        return _build(architecture, config)


def _build(architecture: str, config: Mapping[str, Any]) -> nn.Module:
    timm = _import()
    build = _class(architecture)
    if build is None:
        _check_known(timm, architecture)
    try:
        if build is None:
            return cast(nn.Module, timm.create_model(architecture, **config))
        return build(**config)
    except Exception as error:
        raise ValueError(
            f"timm must be able to build {architecture} with {dict(config)}, got: {error}"
        ) from error


def with_weights(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module:
    """The model with the tensors of a state dict in it; what the state dict lacks stays on meta.

    A classifier of another size (a fine-tuned model's) is built as the state dict has it.

    Raises as `skeleton`, and ValueError where a name or shape is not the model's.
    """
    config = _with_classes(architecture, config, state)
    model = skeleton(architecture, config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, tensor in state.items():
        if shapes.get(name) != tuple(tensor.shape):
            want = shapes.get(name, "no such parameter")
            raise ValueError(
                f"the weights must be those of timm's {architecture}, which has {want} for "
                f"{name}, got {tuple(tensor.shape)}"
            )
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

    A classifier of another size is built as the state dict has it.

    name: what holds `state`, for errors. seed: for what a model draws when it is built.

    Raises as `skeleton`, and ValueError where names or shapes are not those of the model.
    """
    config = _with_classes(architecture, config, state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(architecture, config).float()
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    got = {n: tuple(t.shape) for n, t in state.items()}
    for odd in [
        *(n for n in wanted if wanted[n] != got.get(n)),
        *(n for n in got if n not in wanted),
    ]:
        raise ValueError(
            f"{name} must hold the weights of timm's {architecture}, which has "
            f"{wanted.get(odd, 'no such tensor')} for {odd}, got {got.get(odd, 'no such tensor')}"
        )
    model.load_state_dict(dict(state))
    return model


def _with_classes(
    architecture: str, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The arguments, with as many classes as the classifier in `state` tells apart."""
    model = skeleton(architecture, config)
    head = getattr(model, "pretrained_cfg", {}).get("classifier")
    weight = state.get(f"{head}.weight")
    if (
        weight is not None
        and weight.ndim
        and weight.shape[0] != getattr(model, "num_classes", None)
    ):
        return {**config, "num_classes": weight.shape[0]}
    return dict(config)


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


def _import() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "timm models need the package timm: pip install timm", name="timm"
        ) from error


def _check_known(timm: Any, name: str) -> None:
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise ValueError(f"timm must know the model, got {name!r}{hint}")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _hub_resolves() -> bool:
    """Whether the hub's name can be looked up; behind a proxy it need not be."""
    if urllib.request.getproxies():
        return True
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(hub).hostname, 443)
    except OSError:
        return False
    return True
