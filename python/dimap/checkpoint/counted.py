"""The model whose FLOPs are counted: its build without weights, by a name or by what a checkpoint says of it.

Imports torch, and the library that builds the model: timm, torchvision or transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .. import _timm
from .._errors import near, need
from .._hub import reaching_hub
from . import HUB, TIMM
from .base import Checkpoint

if TYPE_CHECKING:
    from torch import nn

TORCHVISION = "torchvision:"
MODEL_KEY = "dimap_model"  # metadata of an output: its model, where it is not timm's


class Counted(NamedTuple):
    """A model on the meta device, and the metadata by which an output says that it is this one."""

    model: nn.Module
    says: dict[str, str]


def model_of(
    checkpoint: Checkpoint,
    names: Sequence[str],
    named: str | None,
    input_size: int | Sequence[int] | None,
    *,
    asked: bool = True,
) -> Counted | None:
    """The model in a checkpoint.

    names: of all its parameters. named: "timm:NAME" or NAME, "torchvision:NAME", "hf:ORG/NAME" or a folder
        with the config.json of transformers; None asks the checkpoint.
    asked: whether somebody wants FLOPs. Otherwise it is None where the checkpoint does not say it, or
        transformers would build it, which takes seconds to import.

    Raises ValueError where the checkpoint does not say it, or is not of the model that is named;
    ModuleNotFoundError where the library is missing; and whatever a library raises that cannot build it.
    """
    place = str(checkpoint.place)
    described = _timm.described(place, checkpoint.metadata)
    theirs = _of_transformers(Path(place))
    own = checkpoint.metadata.get(MODEL_KEY)
    if named is None and described:
        return _timm_model(checkpoint, names, *described, input_size)._replace(says={})
    if named is None and not asked and (theirs or not (own or "").startswith(TORCHVISION)):
        return None
    if named is None and theirs:
        return Counted(_transformers_model(place), {})
    named = named or own
    if named is None:
        raise ValueError(
            "IN does not say which model it is: give --model timm:NAME, torchvision:NAME, hf:ORG/NAME "
            "or a folder with the config.json of transformers"
        )
    says = {MODEL_KEY: named}
    if named.startswith(TORCHVISION):
        found = Counted(_torchvision_model(checkpoint, named.removeprefix(TORCHVISION)), says)
    elif named.startswith(HUB):
        with reaching_hub("the model needs"):
            found = Counted(_transformers_model(named.removeprefix(HUB)), says)
    elif _of_transformers(Path(named)):
        found = Counted(_transformers_model(named), {})
    else:
        found = _timm_model(checkpoint, names, named.removeprefix(TIMM), {}, input_size)
    said = described or theirs or checkpoint.metadata.keys() & {*found.says, "config"}
    return found._replace(says={}) if said else found


def _timm_model(
    checkpoint: Checkpoint,
    names: Sequence[str],
    architecture: str,
    config: dict[str, Any],
    input_size: int | Sequence[int] | None,
) -> Counted:
    state = {name: checkpoint.tensors[name].meta() for name in names}
    says = {"architecture": architecture}
    try:
        return Counted(_timm.with_weights(architecture, config, state), says)
    except ValueError:  # built for images of another size, it may be
        if input_size is None:
            raise
        sides = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)[-2:]
        config = {**config, "img_size": sides}
        says["config"] = json.dumps(config)
        return Counted(_timm.with_weights(architecture, config, state), says)


def _torchvision_model(checkpoint: Checkpoint, name: str) -> nn.Module:
    import torch

    models = need("torchvision", "the model needs", module="torchvision.models")
    if name not in (known := models.list_models(module=models)):
        raise ValueError(f"torchvision must know the model, got {name!r}{near(name, known)}")
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
        given = checkpoint.shapes()
        own = {name: tuple(p.shape) for name, p in model.named_parameters() if name in given}
        classes = {given[n][0] for n, s in own.items() if given[n] != s and given[n][1:] == s[1:]}
        if len(classes) == 1:  # a classifier of another size
            model = models.get_model(name, weights=None, num_classes=classes.pop())
    return cast("nn.Module", model)


def _of_transformers(folder: Path) -> bool:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("model_type"), str)


def _transformers_model(source: str) -> nn.Module:
    """source: a folder, or a name of the hub. Code that a repository brings is not run."""
    import torch

    library = need("transformers", "the model needs")
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    try:
        config = library.AutoConfig.from_pretrained(source, trust_remote_code=False)
        config._attn_implementation = "eager"  # what every model has
        kinds = (getattr(library, name, None) for name in config.architectures or ())
        kind = next(filter(None, kinds), None)
        with torch.device("meta"):
            model = kind(config) if kind else library.AutoModel.from_config(config)
    finally:
        library.logging.set_verbosity(verbosity)
    return cast("nn.Module", model)
