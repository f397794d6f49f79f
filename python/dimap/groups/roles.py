"""The family `transformer`: names become layers by the roles of their words (see `families.roles`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

from ..families import roles as words
from .layers import Found, Layer, Rule, Shape, Slice, kind_of, layer_name, natural, slices, whole

TRANSFORMER = "transformer"
LEAST = 0.9  # of the weights of the blocks' matrices

_ATTENTION, _MLP, _WEAK_MLP, _NEVER, _EXPERTS, _RAW, _STATE_SPACE = (
    re.compile(text)
    for text in (
        words.ATTENTION,
        words.MLP,
        words.WEAK_MLP,
        words.NEVER,
        words.EXPERTS,
        words.RAW,
        words.STATE_SPACE,
    )
)
_AFFIXES = tuple(map(re.compile, words.AFFIXES))
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


def is_matrix(kind: str, ndim: int) -> bool:
    """Whether names with these words are of matrices in blocks that ought to have a role."""
    parts = kind.split(".")
    if "*" not in parts or (parts[-1] != "weight" and not _RAW.fullmatch(parts[-1])):
        return False
    inside = parts[parts.index("*") :]
    if any(_NEVER.search(part.lower()) for part in inside):
        return False
    return ndim == 2 or (ndim == 3 and any(_EXPERTS.search(part) for part in inside))


def _place(parts: Sequence[str], leaf: int) -> tuple[int, bool] | None:
    """Which component names the part of the block, and whether that is the attention."""
    first = parts.index("*")
    start = first - 1 if first and parts[first + 1 : leaf + 1] else first
    found: tuple[int, bool] | None = None
    for i in range(max(start, 0), leaf):
        low = parts[i].lower()
        if low == "*" or (i < first and not low.endswith("s")):
            continue
        if _ATTENTION.search(low) and not _MLP.search(low):
            found = found if found and found[1] else (i, True)
        elif (_MLP.search(low) and not (found and not found[1])) or (
            _WEAK_MLP.search(low) and found is None
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
        for affix in _AFFIXES:
            found |= {affix.sub("", w) for w in found}
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

    found: the layers; their tower is the beginning of their names, with * for numbers.
    covered: the share of the weights of the blocks' matrices that they are, in [0, 1].
    missed: the blocks' matrices that have no role, with their shapes.
    """

    found: list[Found] = field(default_factory=list)
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
    places: dict[_Key, tuple[str, list[int], str, bool]] = {}
    for short, name in names:
        shape = shapes[name]
        role = role_of(kind_of(short), len(shape)) if len(shape) > 1 else None
        if role is None or _inside(short, recurrent):
            continue
        parts = short.split(".")
        ahead = parts[: role.block]
        counted = [int(p) for p in ahead if p.isdecimal()]
        tower = ".".join("*" if p.isdecimal() else p for p in ahead) + "."
        parent = ".".join([*parts[: role.parent], role.joint, role.other])
        for piece in slices(name, shape) if len(shape) == 3 else [name]:
            key = (role.module, parent, piece.at if isinstance(piece, Slice) else None)
            groups.setdefault(key, []).append((role.part, natural(short), piece))
            places[key] = tower, counted, role.joint, role.last
    mixed = {_words(places[key][0]) for key in groups if key[0] == "qkv"}
    mixed |= {
        _words(".".join("*" if p.isdecimal() else p for p in r.split("."))) for r in recurrent
    }
    guess = Guess()
    for key, group in groups.items():
        tower, counted, joint, last = places[key]
        if not any(_near(_words(tower), other) for other in mixed):
            continue
        parameters = tuple(piece for *_, piece in sorted(group))
        stage = counted[-2] if len(counted) > 1 else None
        layer = Layer(layer_name(parameters, joint), key[0], parameters, stage, counted[-1], tower)
        guess.found.append(Found(layer, Rule(key[0], (), place=_ORDER[key[0]] + last)))
    guess.found.sort(key=_sort)
    _cover(guess, names, shapes, {*ignored, *(n for s, n in names if _inside(s, recurrent))})
    return guess


def _state_space(names: Iterable[str]) -> set[str]:
    """Components that hold a state-space layer or the like, with the names of their parts."""
    found = set()
    for short in names:
        parts = short.removesuffix(".weight").removesuffix(".bias").split(".")
        for i in range(len(parts) - 1, 0, -1):
            if _STATE_SPACE.fullmatch(parts[i].lower()) and not parts[i - 1].isdecimal():
                found.add(".".join(parts[:i]) + ".")
    return found


def _inside(short: str, holders: Collection[str]) -> bool:
    parts = short.split(".")
    return any(".".join(parts[:i]) + "." in holders for i in range(1, len(parts)))


def _words(prefix: str) -> str:
    return ".".join(part for part in prefix.split(".") if part not in ("*", ""))


def _near(tower: str, other: str) -> bool:
    """Whether parts of a block may be of one row, though numbered apart."""
    return f"{tower}.".startswith(f"{other}.") or f"{other}.".startswith(f"{tower}.")


def _sort(found: Found) -> tuple[object, ...]:
    layer = found.layer
    stage = -1 if layer.stage is None else layer.stage
    return _words(layer.tower), stage, layer.block, found.rule.place, natural(layer.name)


def _cover(
    guess: Guess,
    names: Sequence[tuple[str, str]],
    shapes: Mapping[str, Shape],
    ignored: Collection[str],
) -> None:
    """How much of the matrices in the towers' blocks is grouped."""
    heads = tuple({f.layer.tower for f in guess.found})
    claimed = {whole(p) for f in guess.found for p in f.layer.parameters}
    inside = covered = 0
    for short, name in names:
        size, kind = prod(shapes[name]), kind_of(short)
        if name in claimed:
            covered += size
            inside += size
        elif name not in ignored and kind.startswith(heads) and is_matrix(kind, len(shapes[name])):
            inside += size
            guess.missed[name] = shapes[name]
    guess.covered = covered / inside if inside else 0.0
