"""One identity for names: which parameters mean the same weights in two spellings of a model.

A model's parameters are called differently by the library that builds it, in the file that the
library writes, behind a wrapper (torch.compile, DataParallel, FSDP, Lightning) and with fused or
split projections. What stays is a parameter's place in the network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from math import prod
from typing import NamedTuple

from . import group_names
from .known import bare
from .layers import AUX, Layer, Shape, Slice, holds_experts, part_shape, slices, wholes


class Address(NamedTuple):
    """A layer's place in a network, whatever its parameters are called.

    place: the layer's number among those of its module in its block, from 0: 0 is FC1, 1 is FC2.
    """

    module: str
    stage: int | None
    block: int | None
    place: int


class Same(NamedTuple):
    """Names that mean the same weights: one each, or a tensor and those that it was split into.

    What is split is fused projections, or stacked experts, with the first axis flattened away.
    """

    given: tuple[str, ...]
    wanted: tuple[str, ...]


def addresses(modules: Mapping[str, Sequence[Layer]]) -> dict[Address, Layer]:
    """The address of every prunable layer of `find_modules`."""
    found = {}
    for module, layers in modules.items():
        if module == AUX:
            continue
        seen: Counter[tuple[int | None, int | None]] = Counter()
        for layer in layers:
            where = (layer.stage, layer.block)
            found[Address(module, *where, seen[where])] = layer
            seen[where] += 1
    return found


def same_weights(
    given: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    given_at: Mapping[str, Address] | None = None,
) -> list[Same]:
    """For every given name, the wanted names of the same weights.

    They are found as they stand, without what wrappers insert, behind another prefix, or by their
    address in a known family, where a fused tensor stands for those that it is split into.

    given_at: addresses of given names that are known; the others are found from the names.

    Raises ValueError where a name means no wanted one, or might mean one of several.
    """
    if all(name in wanted for name in given):
        return [Same((name,), (name,)) for name in given]
    if pairs := _behind_prefix(given, wanted):
        return pairs
    pairs = list(_by_address(given, wanted, given_at or {}))
    found = {name for pair in pairs for name in pair.given}
    if missing := [name for name in given if name not in found]:
        unknown = [name for name in missing if name not in wanted]
        raise ValueError(_describe_missing(unknown or missing, wanted))
    return pairs


def _behind_prefix(given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[Same]:
    """Pairs of names that differ by wrappers and by one beginning, the shortest possible."""
    short = {bare(name): name for name in given}
    plain = {bare(name): name for name in wanted}
    first = max(short, key=lambda name: name.count("."))  # the most telling one
    words = first.split(".")
    for at in range(max(1, len(words) - 2)):  # at least three words stay: a layer, not ".weight"
        tail = ".".join(words[at:])
        drop = first.removesuffix(tail)
        adds = {name.removesuffix(tail) for name in plain if ("." + name).endswith("." + tail)}
        found = {}
        for add in adds:
            names = [add + name[len(drop) :] if name.startswith(drop) else "" for name in short]
            if all(name in plain for name in names):
                pairs = zip(short.values(), (plain[name] for name in names), strict=True)
                found[add] = [Same((g,), (w,)) for g, w in pairs]
        if drop == "" and "" in found:
            return found[""]
        alike = [p for p in found.values() if all(given[g[0]] == wanted[w[0]] for g, w in p)]
        choices = alike or list(found.values())
        if len(choices) > 1:
            every = ", ".join(sorted(pairs[0].wanted[0] for pairs in choices))
            raise ValueError(
                f"masks must belong to one part of the model, got {short[first]}, which may be any "
                f"of {every}: give the masks the full names of one of them"
            )
        if choices:
            return choices[0]
    return []


def _by_address(
    given: Mapping[str, Shape], wanted: Mapping[str, Shape], given_at: Mapping[str, Address]
) -> Iterator[Same]:
    there = addresses(_grouped(wanted))
    here: dict[Address, list[str]] = {}
    for name, shape in given.items():
        if name not in given_at:
            continue
        at = given_at[name]
        pieces = slices(name, shape) if holds_experts(name, shape) else [name]
        for i, piece in enumerate(pieces):
            here.setdefault(at._replace(place=at.place + i), []).append(piece)
    if len(given_at) < len(given):
        rest = {name: shape for name, shape in given.items() if name not in given_at}
        here |= {at: [*layer.parameters] for at, layer in addresses(_grouped(rest)).items()}
    titles = _same_towers(
        {at: sum(prod(part_shape(given, n)) for n in names) for at, names in here.items()},
        {
            at: sum(prod(part_shape(wanted, n)) for n in layer.parameters)
            for at, layer in there.items()
        },
    )
    stacks: dict[str, tuple[list[str], list[str]]] = {}  # whole tensors of what is met in slices
    for at, names in here.items():
        title, _, module = at.module.rpartition(".")
        other = titles.get(title, title)
        layer = there.get(at._replace(module=f"{other}.{module}" if other else module))
        if layer is None:
            continue
        stack = next((p.parameter for p in (*names, *layer.parameters) if isinstance(p, Slice)), "")
        if stack:
            ours, theirs = stacks.setdefault(stack, ([], []))
            ours += names
            theirs += layer.parameters
        elif len(names) == len(layer.parameters):
            yield from (Same((g,), (w,)) for g, w in zip(names, layer.parameters, strict=True))
        elif 1 in (len(names), len(layer.parameters)):
            yield Same(tuple(names), layer.parameters)
    yield from (Same(tuple(wholes(g)), tuple(wholes(w))) for g, w in stacks.values())


def _same_towers(here: Mapping[Address, int], there: Mapping[Address, int]) -> dict[str, str]:
    """What towers that are called otherwise are called there: those with as many weights in every
    layer, where only one is. A library's files may call a tower otherwise than its models.

    here, there: the weights of each layer.
    """
    ours, theirs = _layers_of_towers(here), _layers_of_towers(there)
    titles = {}
    for title, layers in ours.items():
        alike = [other for other, found in theirs.items() if found == layers]
        if title not in theirs and len(alike) == 1:
            titles[title] = alike[0]
    return titles


def _layers_of_towers(sizes: Mapping[Address, int]) -> dict[str, dict[Address, int]]:
    towers: dict[str, dict[Address, int]] = {}
    for at, size in sizes.items():
        title, _, module = at.module.rpartition(".")
        towers.setdefault(title, {})[at._replace(module=module)] = size
    return towers


def _grouped(shapes: Mapping[str, Shape]) -> dict[str, list[Layer]]:
    try:
        return group_names(shapes)
    except ValueError:  # of no known family
        return {}


def _describe_missing(missing: Sequence[str], wanted: Collection[str]) -> str:
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    near = get_close_matches(missing[0], wanted, n=1, cutoff=0) or ["none"]
    return (
        f"model must have every masked parameter, got none called {missing[0]}{more}; "
        f"the nearest of its {len(wanted)} names is {near[0]}"
    )
