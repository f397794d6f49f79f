"""The family `transformer`: names become layers by the roles of their words (see `families.roles`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ..families import roles as words
from .known import tower_names
from .layers import Layer, Shape, Slice, claimed, kind_of, layer_name, natural, position, slices

TRANSFORMER = "transformer"
LEAST = 0.9  # of the weights of the blocks' matrices

_ORDER = {"qkv": 0, "proj": 1, "mlp": 2}
_Key = tuple[str, str, "int | None"]  # module, what the tensors of a layer share, slice


class Role(NamedTuple):
    """What a kind of names is for.

    block: how many of the name's components lead to the block.
    parent: how many lead to what the tensors of a layer share; all: a layer of its own.
    joint: what a layer of several tensors is called. part: the place among them.
    other: what is said beside the role, as in `query_global`: the same for all of a layer.
    last: whether it is behind the others of its module in the block: the MLP's way out.
    """

    module: str
    block: int
    parent: int
    joint: str = ""
    part: int = 0
    other: str = ""
    last: bool = False


@lru_cache(maxsize=4096)
def role_of(kind: str, ndim: int) -> Role | None:
    """The role of names with these words, numbers as *; None for what is not pruned."""
    if not is_matrix(kind, ndim):
        return None
    parts = kind.removesuffix(".weight").split(".")
    end = len(parts)
    while end > 1 and parts[end - 1] in words.INNER and parts[end - 2] != "*":
        end -= 1
    leaf = end - 1
    while leaf > 1 and parts[leaf] in ("*", "dense") and _said(parts[leaf - 1]):
        leaf -= 1  # to_out.*, output.dense
    place = _place(parts, leaf)
    if place is None:
        return None
    where, attention = place
    stars = [i for i in range(where) if parts[i] == "*"]
    if stars:
        block = stars[-1] + 1
    elif where + 1 < leaf and parts[where + 1] == "*":  # attentions.*, ffns.*
        block = where + 2
    else:
        return None
    word = parts[leaf].lower().removesuffix("_weight")
    return _named(word, attention, block, leaf, len(parts))


def _said(part: str) -> bool:
    """Whether a component says a role that the number or `dense` behind it does not."""
    names = _bare(part.lower())
    return bool(names & {*words.PROJ, "intermediate", "output"}) and part != "*"


@lru_cache(maxsize=4096)
def is_matrix(kind: str, ndim: int) -> bool:
    """Whether names with these words are of matrices in blocks that ought to have a role."""
    parts = kind.split(".")
    if "*" not in parts or (parts[-1] != "weight" and not re.fullmatch(words.RAW, parts[-1])):
        return False
    inside = parts[parts.index("*") :]
    if any(re.search(words.NEVER, part.lower()) for part in inside):
        return False
    return ndim == 2 or (ndim == 3 and any(re.search(words.EXPERTS, part) for part in inside))


def _place(parts: Sequence[str], leaf: int) -> tuple[int, bool] | None:
    """Which component names the part of the block, and whether that is the attention."""
    first = parts.index("*")
    start = first - 1 if first and parts[first + 1 : leaf + 1] else first
    found: tuple[int, bool] | None = None
    for i in range(max(start, 0), leaf):
        low = parts[i].lower()
        if low == "*" or (i < first and not low.endswith("s")):
            continue
        if re.search(words.ATTENTION, low) and not re.search(words.MLP, low):
            found = found if found and found[1] else (i, True)
        elif (re.search(words.MLP, low) and not (found and not found[1])) or (
            re.search(words.WEAK_MLP, low) and found is None
        ):
            found = i, False
    if found is not None:
        return found
    word = parts[leaf]
    if leaf > first and parts[leaf - 1] == "*" and word.lower() in ("intermediate", "output"):
        return leaf, False
    if leaf > first and (word in words.ATTENTION_LEAVES or word in words.MLP_LEAVES):
        return leaf, word in words.ATTENTION_LEAVES
    return None


@lru_cache(maxsize=1024)
def _bare(word: str) -> frozenset[str]:
    """A word, and what is left of it without affixes."""
    found = {word}
    for _ in range(2):
        for affix in words.AFFIXES:
            found |= {re.sub(affix, "", w) for w in found}
    return frozenset(found - {""})


def _named(word: str, attention: bool, block: int, leaf: int, size: int) -> Role | None:
    names = _bare(word)

    def alone(module: str, known: Iterable[str]) -> Role | None:
        last = module == "mlp" and bool(names & set(words.MLP_OUT))
        return Role(module, block, size, last=last) if names & set(known) else None

    def split(module: str, joint: str, known: Sequence[Iterable[str]]) -> Role | None:
        for part, spellings in enumerate(known):
            if hit := sorted(names & set(spellings), key=len):
                other = word.replace(hit[-1], "", 1)
                return Role(module, block, leaf, joint, part, other)
        return None

    if attention:
        return (
            split("qkv", "qkv", words.QKV_SPLIT)
            or alone("qkv", words.QKV_ALONE)
            or alone("proj", words.PROJ)
        )
    return split("mlp", "gate_up_proj", words.MLP_SPLIT) or alone("mlp", words.MLP_ALONE)


@dataclass
class Guess:
    """A grouping by roles.

    found: the layers, in order.
    covered: the share of the weights of the blocks' matrices that they are, in [0, 1].
    missed: the blocks' matrices that have no role, with their shapes.
    """

    found: list[Layer] = field(default_factory=list)
    covered: float = 0.0
    missed: dict[str, Shape] = field(default_factory=dict)


def by_roles(
    names: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
    ignored: Collection[str] = (),
) -> Guess:
    """Group by roles.

    names: what is read, and the parameter's name. ignored: what need not have a role.
    """
    recurrent = _state_space(short for short, _ in names)
    groups: dict[_Key, list[tuple[int, list[int | str], str]]] = {}
    places: dict[_Key, tuple[str, Role]] = {}  # the beginning of the names, to the block
    heads: set[str] = set()  # these with * for numbers
    for short, name in names:
        shape = shapes[name]
        role = role_of(kind_of(short), len(shape)) if len(shape) > 1 else None
        if role is None or _inside(short, recurrent):
            continue
        parts = short.split(".")
        parent = ".".join([*parts[: role.parent], role.joint, role.other])
        for piece in slices(name, shape) if len(shape) == 3 else [name]:
            key = (role.module, parent, piece.at if isinstance(piece, Slice) else None)
            groups.setdefault(key, []).append((role.part, natural(short), piece))
            places[key] = ".".join(parts[: role.block]) + ".", role
    # Of the blocks that have attention, or what stands for it; their parts may be numbered apart.
    mixed = {_words(places[key][0]) for key in groups if key[0] == "qkv"}
    mixed |= set(map(_words, recurrent))
    found: list[tuple[tuple[object, ...], Layer]] = []
    for key, group in groups.items():
        start, role = places[key]
        tower = _words(start)
        if not any(_near(tower, other) for other in mixed):
            continue
        *_, stage, block = [None, *(int(part) for part in start.split(".") if part.isdecimal())]
        parameters = tuple(piece for *_, piece in sorted(group))
        layer = Layer(layer_name(parameters, role.joint), key[0], parameters, stage, block, tower)
        order = *position(layer, -1), _ORDER[key[0]] + role.last, natural(layer.name)
        found.append((order, layer))
        heads.add(kind_of(start))
    found.sort(key=lambda each: each[0])
    prefixes = {layer.tower: f"{layer.tower}." if layer.tower else "" for _, layer in found}
    titles = tower_names(prefixes.values())
    guess = Guess([layer.in_tower(titles[prefixes[layer.tower]]) for _, layer in found])
    _cover(guess, names, shapes, {*ignored, *(n for s, n in names if _inside(s, recurrent))}, heads)
    return guess


def _state_space(names: Iterable[str]) -> set[str]:
    """Components that hold a state-space layer or the like, with the names of their parts."""
    found = set()
    for short in names:
        parts = short.removesuffix(".weight").removesuffix(".bias").split(".")
        for i in range(len(parts) - 1, 0, -1):
            if re.fullmatch(words.STATE_SPACE, parts[i].lower()) and not parts[i - 1].isdecimal():
                found.add(".".join(parts[:i]) + ".")
    return found


def _inside(short: str, holders: Collection[str]) -> bool:
    parts = short.split(".")
    return any(".".join(parts[:i]) + "." in holders for i in range(1, len(parts)))


def _words(prefix: str) -> str:
    """The beginning of a name without its numbers: what stages and blocks of one tower share."""
    return ".".join(part for part in prefix.split(".") if part and not part.isdecimal())


def _near(tower: str, other: str) -> bool:
    """Whether one of them is in the other, or is the other."""
    return f"{tower}.".startswith(f"{other}.") or f"{other}.".startswith(f"{tower}.")


def _cover(
    guess: Guess,
    names: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
    ignored: Collection[str],
    heads: Collection[str],
) -> None:
    """How much of the matrices in the blocks, whose names begin with one of `heads`, is grouped."""
    known, begin = claimed(guess.found), tuple(heads)
    for short, name in names:
        kind = kind_of(short)
        inside = kind.startswith(begin) and is_matrix(kind, len(shapes[name]))
        if inside and name not in known and name not in ignored:
            guess.missed[name] = shapes[name]
    covered, missed = (sum(prod(shapes[n]) for n in some) for some in (known, guess.missed))
    guess.covered = covered / (covered + missed) if covered else 0.0
