"""What a table of names is made of: `Family` and `Row`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A kind of prunable layer.

    parts: patterns relative to the block. One is one tensor. Several are the tensors of one layer,
        joined by what they capture and ranked in this order: q, k, v; q, kv; gate, up.
    name: last component of the name of a layer of several tensors; by default the module's name.
    ndims: how many dimensions the weights may have; 4 are those of a 1 x 1 convolution.
    optional: places in `parts` of tensors that a layer may lack: an MLP without a gate.
    stacked: the first axis of a tensor counts layers: [experts, out, in] or [experts, in, out].
    """

    module: str
    parts: tuple[str, ...]
    name: str = ""
    ndims: tuple[int, ...] = (2,)
    optional: tuple[int, ...] = ()
    stacked: bool = False


MATRIX = (2,)
POINTWISE = (2, 4)


def named(
    module: str,
    *names: str,
    name: str = "",
    ndims: tuple[int, ...] = MATRIX,
    optional: tuple[int, ...] = (),
) -> Row:
    """A row of tensors that are called exactly so within the block; `.weight` is left out."""
    return Row(module, tuple(re.escape(f"{n}.weight") for n in names), name, ndims, optional)


def stacked(module: str, name: str) -> Row:
    """A row of experts in one tensor of three dimensions."""
    return Row(module, (rf"{re.escape(name)}(?:\.weight)?",), ndims=(3,), stacked=True)


Counts = Mapping[str, "int | None"]  # layers of a block, by module; None: one or more


@dataclass(frozen=True)
class Family:
    """Names of one family of models.

    name: of this way of naming. network: what is so named; tables of one network name the same
        layers in the same order, so masks fit from one to the other.
    block: beginning of a block's names, with `(?P<block>…)`, a number from 0 within the stage, and
        where there are stages `(?P<stage>…)`; the stage is the captured text's place in `stages`.
    stage: beginning of a stage's names, to locate parameters that belong to no block.
    rows: what is pruned; block_aux: what else a block may have; both relative to the block.
    aux: what is expected outside the blocks; all else there is not pruned either, with a note.
    per_block: layers of a block, by module; of several, a block must be as one of them says.
    mark: what one block has at least, relative to it; tells what another table would fit too.
    language: a model of language, of which magnitude alone is a poor judge.
    """

    name: str
    models: str
    block: str
    rows: tuple[Row, ...]
    network: str = ""
    block_aux: tuple[str, ...] = ()
    aux: tuple[str, ...] = ()
    stage: str = ""
    stages: range | tuple[str, ...] = range(1000)
    per_block: tuple[Counts, ...] = field(default=({"qkv": 1, "proj": 1, "mlp": 2},), hash=False)
    mark: str = ""
    language: bool = False
