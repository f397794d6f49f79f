"""Which parameters are pruned, and which of them together: names become layers and modules.

Nothing here reads a weight. `find_modules` takes a model or a state dict, `group_names` only names
and shapes. The tables of known names are in `families`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from ..families import BUFFERS, FAMILIES, Family
from ..families import roles as words
from .choice import Choice, Patterns, choose
from .known import Names, Tower, bare, fitting, merge, tower_names, towers
from .layers import (
    AUX,
    Layer,
    Located,
    Modules,
    Shape,
    Slice,
    aux_layer,
    by_module,
    claimed,
    first,
    kind_of,
    kinds,
    part_of,
    part_shape,
    position,
    prunable,
    whole,
    wholes,
)
from .patterns import group_by
from .roles import LEAST, TRANSFORMER, Guess, by_roles
from .tied import named_tensors, ties_of, untie

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "AUX",
    "Choice",
    "Grouping",
    "Layer",
    "Located",
    "Patterns",
    "Shape",
    "Slice",
    "choose",
    "describe",
    "family_of",
    "find_modules",
    "group",
    "group_names",
    "is_parameter",
    "kind_of",
    "named_tensors",
    "part_of",
    "part_shape",
    "position",
    "propose",
    "prunable",
    "shapes_of",
    "tied_in",
    "whole",
    "wholes",
    "without_buffers",
]

Model: TypeAlias = "nn.Module | Mapping[str, Tensor]"

# Matrices of which a model of language has one, and others have not.
_WORDS = re.compile(
    r"(?:.+\.)?(?:embed_tokens|embed_in|wte|word_embeddings|word_embedding|shared|tok_embeddings"
    r"|token_embedding|token_embd)\.weight"
)
# In a layer of an encoder, or of a decoder that looks at one.
_ENCODER = re.compile(r"(?:^|[._])encoder|EncDec")
COSTLY = (
    "magnitude alone costs language models dearly (LLaMA-2-7B at 50 %: perplexity 5.1 becomes 14.9; "
    "6.4 by Wanda, which looks at activations): a lower sparsity or a saliency of your own is advised"
)


@dataclass(frozen=True)
class Grouping:
    """How a model's parameters are grouped.

    modules: module name -> layers, "aux" last, as `find_modules` returns them.
    families: of each tower by its name, "" where there is one; none for the caller's own patterns.
    notes: what the user should know of it, one sentence each.
    costly: whether it has a decoder of words, which loses much where it is pruned by magnitude (`COSTLY`).
    """

    modules: Modules
    families: dict[str, Family] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    costly: bool = False


def find_modules(
    model: Model,
    patterns: Patterns | Choice | None = None,
    *,
    family: str | None = None,
    ignore: str | Sequence[str] | None = None,
) -> dict[str, list[Layer]]:
    """Group a model's parameters into layers and modules, by their names and shapes alone.

    model: an nn.Module or a state dict; any device, meta too. Of a state dict, buffers are left
        out: those of `families.BUFFERS`, and what is neither floating point nor called `weight`.
    patterns: instead of the known families, the caller's own: module name -> regex, or a list of
        them, each matched against whole parameter names (`re.fullmatch`); the first that matches
        wins. A tuple (or list) in the list is one layer made of several tensors, in that order,
        joined by what its regexes capture. Named groups `stage` and `block` give those numbers; a group
        `part` of alternatives, as in (?P<part>q|k|v), stands for such a tuple:

            {"qkv": [tuple(rf"blocks\\.(?P<block>\\d+)\\.attn\\.{x}\\.weight" for x in "qkv")],
             "mlp": r"blocks\\.(?P<block>\\d+)\\.mlp\\.fc[12]\\.weight"}

    family: a name of `families.FAMILIES`, the only one to be tried; or "transformer", which groups
        any model by the words in its names and refuses where these say too little.
    ignore: a regex, or several, of names of layers or parameters that are never pruned.

    Returns module name -> layers, "aux" (never pruned) last; every parameter is in exactly one
    layer, or slices of it are. Where a model has several towers, such as one for images and one for
    text, each has modules of its own: "vision_model.qkv". Layers of a module stand in the order of
    stage, block and place in the block (own patterns: stage, block, name with its numbers taken as
    numbers), however the mapping is ordered: so a model, its file (safetensors sorts names) and its
    split or fused form resolve ties alike. "aux" keeps the mapping's order.

    Raises ValueError for a model of no known family or one that differs from it, and for patterns
    that are malformed, match nothing, or match a parameter of fewer than two dimensions; TypeError
    for anything but a model, a mapping of tensors, or patterns of the form above.
    """
    return group(shapes_of(model), choose(patterns, family, ignore), tied_in(model)).modules


def shapes_of(model: Model) -> dict[str, Shape]:
    """The names and shapes of a model's parameters, or of those in a state dict.

    Raises TypeError for anything but a model or a mapping of tensors.
    """
    from torch import Tensor, nn

    if isinstance(model, nn.Module):
        return {name: tuple(p.shape) for name, p in named_tensors(model).items()}
    state: object = model  # callers are not bound by the annotation
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise TypeError(f"model must be an nn.Module or a mapping of names to tensors, got {kind}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            hint = ": dequantize the model first" if "_packed_params" in name else ""
            raise TypeError(f"a state dict must hold tensors only, got {kind} under {name!r}{hint}")
    return {
        name: tuple(tensor.shape)
        for name, tensor in state.items()
        if is_parameter(name, tensor.is_floating_point())
    }


def tied_in(model: Model) -> list[tuple[str, ...]]:
    """The names of each set of a model's parameters that are the same weights: see `ties_of`."""
    names = shapes_of(model)
    return ties_of({name: t for name, t in named_tensors(model).items() if name in names})


def is_parameter(name: str, floating_point: bool) -> bool:
    """Whether an entry of a state dict is taken for a parameter, known buffers aside.

    A weight of another type is one too: quantized weights differ from counters by this.
    """
    return floating_point or name.rpartition(".")[2] == "weight"


def group_names(
    shapes: Mapping[str, Sequence[int]], patterns: Patterns | Choice | None = None
) -> dict[str, list[Layer]]:
    """`find_modules` on names and shapes: leaves out known buffers, knows nothing of dtypes."""
    return group(shapes, patterns).modules


def family_of(shapes: Mapping[str, Sequence[int]]) -> Family | None:
    """The family of the one tower of these names; None: of several towers, or of no known family."""
    try:
        families = group(shapes).families
    except ValueError:
        return None
    return families.get("")


def group(
    shapes: Mapping[str, Sequence[int]],
    patterns: Patterns | Choice | None = None,
    ties: Sequence[tuple[str, ...]] = (),
) -> Grouping:
    """`group_names`, with the families and notes.

    ties: names that are the same weights, as `tied_in` finds them; each weight is in one layer, and
        in "aux" if any of its names is.
    """
    choice = choose(patterns)
    seen = without_buffers(shapes)
    if not seen:
        raise ValueError(
            "model must have at least one parameter of floating point, got none: dequantize first one "
            "that is quantized"
        )
    names = [(bare(name), name) for name in seen]
    notes: list[str] = []
    families: dict[str, Family] = {}
    if choice.patterns is not None:
        modules = group_by(choice.patterns, seen)
    elif choice.family == TRANSFORMER:
        modules = _by_roles(names, seen, choice.ignored(seen), notes)
    else:
        modules, families = _by_family(choice, names, seen, notes)
    modules, left_out = choice.leave_out(modules, seen)
    notes += left_out
    modules = untie(modules, ties, notes)
    spoken = {t for t, family in families.items() if family.language}
    if choice.family == TRANSFORMER:
        spoken = {x.tower for x in prunable(modules)}
    spoken -= {x.tower for x in prunable(modules) if _ENCODER.search(x.name)}
    costly = bool(spoken) and any(_WORDS.fullmatch(name) for name, _ in names)
    return Grouping(modules, families, tuple(notes), costly)


def propose(shapes: Mapping[str, Sequence[int]]) -> tuple[Guess, Modules]:
    """What the words of any model's names say of its layers, however little; never an error."""
    seen = without_buffers(shapes)
    guess = by_roles([(bare(name), name) for name in seen], seen)
    return guess, _modules_of(guess, seen)


def _modules_of(guess: Guess, shapes: Mapping[str, Shape]) -> Modules:
    known = claimed(guess.found)
    aux = (aux_layer(name) for name in shapes if name not in known)
    return by_module(guess.found, dict.fromkeys(layer.module for layer in guess.found), aux)


_BUFFER = re.compile("|".join(BUFFERS))


def without_buffers(shapes: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """What of names and shapes is no buffer of `families.BUFFERS`."""
    return {name: tuple(s) for name, s in shapes.items() if not _BUFFER.fullmatch(bare(name))}


def _by_family(
    choice: Choice, names: Names, shapes: Mapping[str, Shape], notes: list[str]
) -> tuple[Modules, dict[str, Family]]:
    families = [family for family in FAMILIES if choice.family in (None, family.name)]
    ignored = choice.ignored(shapes)
    fit, near = fitting(towers(families, names, shapes, ignored))
    if near:
        raise ValueError(_describe_misfit(near[0], shapes))
    if not fit:
        raise ValueError(_describe_unknown(families, shapes))
    modules, unknown = merge(fit, names, shapes)
    if unknown := [name for name in unknown if name not in ignored]:
        notes.append(_outside(fit, unknown, shapes))
    titles = tower_names(tower.prefix for tower in fit)
    return modules, {titles[tower.prefix]: tower.family for tower in fit}


def _outside(fit: Sequence[Tower], unknown: Sequence[str], shapes: Mapping[str, Shape]) -> str:
    weights = sum(prod(shapes[name]) for name in unknown)
    share = 100 * weights / max(sum(map(prod, shapes.values())), 1)
    where = Counter(".".join(kind_of(name).split(".")[:2]) for name in unknown)
    names = " and ".join(dict.fromkeys(tower.family.name for tower in fit))
    return (
        f"never pruned, being outside the blocks of {names}: {len(unknown)} tensors with {share:.1f} % "
        f"of all weights, in {', '.join(first(list(where), 6))}"
    )


def _by_roles(
    names: Names, shapes: Mapping[str, Shape], ignored: set[str], notes: list[str]
) -> Modules:
    guess = by_roles(names, shapes, ignored)
    modules = _modules_of(guess, shapes)
    if guess.covered < LEAST:
        raise ValueError(
            f"family='transformer' must find the roles of {100 * LEAST:.0f} % of the weights in the "
            f"blocks' matrices in their names, got {100 * guess.covered:.1f} %"
            + (f"; it found\n{describe(modules)}" if guess.found else "")
            + ("\nIt does not know\n" + kinds(guess.missed) if guess.missed else "")
            + "\n"
            + _ways_out(shapes, kind=kind_of(next(iter(guess.missed), "")))
        )
    notes.append("grouped by the words of the names (family transformer):\n" + describe(modules))
    if guess.missed:
        notes.append("in the blocks, but never pruned:\n" + kinds(guess.missed))
    return modules


def describe(modules: Mapping[str, Sequence[Layer]]) -> str:
    """Which kinds of names are in which module, numbers as *."""
    found = Counter(
        (layer.module, " + ".join(map(kind_of, wholes(layer.parameters))))
        for layer in prunable(modules)
    )
    return "\n".join(first([f"  {m}: {count} x {kind}" for (m, kind), count in found.items()], 24))


def _describe_unknown(families: Sequence[Family], shapes: Mapping[str, Shape]) -> str:
    if quantized := _quantized(shapes):
        return quantized
    one = f"the family {families[0].name}" if len(families) == 1 else "a known family"
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    convolved = sum(prod(shape) for shape in matrices if len(shape) > 3)
    got = "other names"
    most = 2 * convolved > sum(map(prod, shapes.values()))
    if most and not propose(shapes)[0].found and _example(shapes):
        got = (
            "one that looks like a convolutional network: dimap groups the blocks of transformers, "
            "and the layers of other networks by patterns of your own"
        )
    return (
        f"model must be of {one} (`dimap families` lists all), got {got}.\n{_ways_out(shapes)}\n"
        f"It has {len(shapes)} parameters, {len(matrices)} of two or more dimensions:\n{kinds(shapes)}"
    )


def _describe_misfit(tower: Tower, shapes: Mapping[str, Shape]) -> str:
    if quantized := _quantized(shapes):
        return quantized
    problems = "\n  ".join(first(tower.problems))
    family = tower.family
    unknown = re.search(r"unknown weight (\S+)", problems)
    return (
        f"model must be of a known family, got one that resembles {family.name} "
        f"({family.models}) but differs:\n  {problems}\n"
        + _ways_out(shapes, kind_of(unknown[1]) if unknown else "")
    )


def _quantized(shapes: Mapping[str, Shape]) -> str:
    """The error of a model that is quantized, as what stands beside its weights says; "" of others."""
    for name in shapes:
        home, _, leaf = name.rpartition(".")
        beside = leaf == "scales" and f"{home}.weight" in shapes  # some layer's own parameter
        if re.fullmatch(words.QUANTIZED, leaf) and not beside:
            return (
                f"model must not be quantized to be pruned, got {name}, which belongs to quantized "
                "weights: dequantize it first, or prune the model that it was made from"
            )
    return ""


def _ways_out(shapes: Mapping[str, Shape], kind: str = "") -> str:
    """What the caller can do, in Python and on the command line, with lines to paste.

    kind: the names, with * for numbers, that stand in the way.
    """
    lines = []
    if kind:
        regex = _regex(kind)
        lines.append(f"  ignore=r{regex!r}  --ignore '{regex}'".replace("\\\\", "\\"))
        lines.append("    never prunes what matches")
    if propose(shapes)[0].covered >= LEAST:
        lines += [
            f'  family="{TRANSFORMER}"  --family {TRANSFORMER}',
            "    groups by the words of the names, and shows how",
        ]
    example = _example(shapes)
    if example:
        lines += [
            f"  patterns={_written(example)}",
            "  " + " ".join(f"--pattern '{m}={r}'" for m, rows in example.items() for r in rows),
            "    names the modules by regexes that match whole parameter names; a group (?P<block>...)",
            "    captures the block; what no regex matches is never pruned",
        ]
    if not lines:
        return (
            "None of its parameters looks like a matrix that can be pruned. (Weights that are "
            "quantized may be no parameters: dequantize them first.)"
        )
    return "What you can do, in Python and on the command line:\n" + "\n".join(lines)


def _example(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    """Patterns for the model's own names: by the roles of their words as far as they go."""
    _, modules = propose(shapes)
    found: dict[str, dict[str, None]] = {}
    for layer in prunable(modules):
        for name in wholes(layer.parameters):
            found.setdefault(layer.module, {})[_regex(kind_of(name))] = None
    if not found:
        matrices = [
            kind_of(name)
            for name, shape in shapes.items()
            if len(shape) > 1
            and 0 not in shape
            and not any(re.search(words.BESIDE, part.lower()) for part in name.split("."))
        ]
        numbered = [kind for kind in matrices if "*" in kind] or matrices
        found = {"all": {_regex(numbered[0]): None}} if numbered else {}
    return {module: list(regexes) for module, regexes in list(found.items())[:3]}


def _written(example: Mapping[str, Sequence[str]]) -> str:
    rows = [
        f'"{module}": [' + ", ".join(f'r"{regex}"' for regex in regexes) + "]"
        for module, regexes in example.items()
    ]
    return "{" + ", ".join(rows) + "}"


def _regex(kind: str) -> str:
    """A regex for names of this kind: the last number is the block."""
    parts = [r"\d+" if part == "*" else _escape(part) for part in kind.split(".")]
    if r"\d+" in parts:
        parts[len(parts) - 1 - parts[::-1].index(r"\d+")] = r"(?P<block>\d+)"
    return r"\.".join(parts)


def _escape(text: str) -> str:
    return re.sub(r"([$()*+?\[\\\]^{|}])", r"\\\1", text)
