"""Where one threshold holds: the scope of every layer, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from . import AUX

Scope = Literal["module", "global", "layer", "type", "block", "stage"]


class LayerLike(Protocol):
    """The part of `groups.Layer` that is read here."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> int | None: ...
    @property
    def block(self) -> int | None: ...


def scope_names(modules: Mapping[str, Sequence[LayerLike]], scope: str) -> dict[str, str]:
    """Layer name -> name of the scope that the layer is ranked in; "aux" left out.

    "module": the module's name. "global": "global". "layer": the layer's name. "type": the module's
    name, with the layer's place in its block where a block has several: "mlp.1" is every FC1,
    "mlp.2" every FC2. "block": "stage 0 block 1", or "block 1" where there are no stages. "stage":
    "stage 0", which is the whole network where there are none.

    Raises ValueError where a layer lacks the number that its scope is named after.
    """
    pruned = {module: layers for module, layers in modules.items() if module != AUX}
    names: dict[str, str] = {}
    for module, layers in pruned.items():
        seen: Counter[tuple[int | None, int | None]] = Counter()
        for layer in layers:
            if scope in ("type", "block", "stage"):
                place = block_name(layer, "stage" if scope == "stage" else "block", "scope", scope)
            if scope == "type":
                seen[layer.stage, layer.block] += 1
                names[layer.name] = f"{module}.{seen[layer.stage, layer.block]}"
            elif scope in ("block", "stage"):
                names[layer.name] = place
            else:
                names[layer.name] = {"module": module, "layer": layer.name}.get(scope, scope)
        if scope == "type" and max(seen.values(), default=0) <= 1:
            names.update(dict.fromkeys((layer.name for layer in layers), module))
    return names


def block_name(layer: LayerLike, kind: Literal["block", "stage"], argument: str, value: str) -> str:
    """A layer's block or stage in words. argument, value: what asks for it, for the error."""
    # A model of one stage numbers its blocks only.
    if layer.block is None and (kind == "block" or layer.stage is None):
        raise ValueError(
            f"{argument}={value!r} needs the {kind} of every prunable layer, "
            f"got none for {layer.name}: name it in the patterns, as (?P<{kind}>...)"
        )
    if kind == "stage":
        return f"stage {layer.stage or 0}"
    where = f"block {layer.block}"
    return where if layer.stage is None else f"stage {layer.stage} {where}"
