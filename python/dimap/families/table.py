"""What a table of names is made of, `Family` and `Row`, and the short way in which the tables say it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Counts = Mapping[str, "int | None"]  # layers of a block, by module; None: one or more
MODULES = ("qkv", "proj", "mlp")


@dataclass(frozen=True)
class Row:
    """A kind of prunable layer.

    parts: patterns relative to the block. One is one tensor. Several are the tensors of one layer,
        joined by what they capture and ranked in this order: q, k, v; q, kv; gate, up.
    name: last component of the name of a layer of several tensors; by default the module's name.
    ndims: how many dimensions the weights may have, 4 being those of a 1 x 1 convolution; none: two or
        more.
    optional: places in `parts` of tensors that a layer may lack: an MLP without a gate.
    stacked: the first axis of a tensor counts layers: [experts, out, in] or [experts, in, out]. None:
        of three dimensions under `experts` it does.
    """

    module: str
    parts: tuple[str, ...]
    name: str = ""
    ndims: tuple[int, ...] = (2,)
    optional: tuple[int, ...] = ()
    stacked: bool | None = False


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
    language: decoders of language, of which magnitude alone is a poor judge.
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


def family(
    title: str,
    block: str,
    qkv: str = "attn.qkv",
    proj: str = "attn.proj",
    mlp: str = "mlp.fc1 mlp.fc2",
    *,
    network: str = "",
    block_aux: str = "",
    aux: str = "",
    stages: range | tuple[str, ...] = range(1000),
    per_block: Sequence[tuple[int | None, ...]] = ((1, 1, 2),),
    mark: str = "",
    language: bool = False,
) -> Family:
    """A `Family` in short, its names as in `regex`, with blanks between them.

    title: "NAME: MODELS".
    qkv, proj, mlp: the rows of these modules (see `row`); timm's names where they are not given.
    per_block: how many layers of each of them a block has; of several, one must be true.
    """
    stage, captured, _ = block.partition(">.")
    name, _, models = title.partition(": ")
    return Family(
        name,
        models,
        regex(block),
        tuple(
            row(module, text)
            for module, texts in zip(MODULES, (qkv, proj, mlp), strict=True)
            for text in texts.split()
        ),
        network,
        tuple(map(regex, block_aux.split())),
        tuple(map(regex, aux.split())),
        regex(stage + captured) if "<stage" in stage else "",
        stages,
        tuple(dict(zip(MODULES, counts, strict=True)) for counts in per_block),
        regex(mark),
        language,
    )


def row(module: str, text: str) -> Row:
    """A `Row` in short: the name, as in `regex`, of a weight in the block, without `.weight`.

    `attn.{q,k,v}` are three tensors of one layer, `mlp.{gate?,up}` two of which it may lack the first;
    `=gate_up` behind them is what such a layer is called. `:24` behind a name: the weights may have 2
    or 4 dimensions, in place of 2 alone; `[*]`: one tensor stacks layers.
    """
    text, _, name = text.partition("=")
    text, _, ndims = text.partition(":")
    if text.endswith("[*]"):
        return Row(module, (regex(f"{text[:-3]}(.weight)?"),), ndims=(3,), stacked=True)
    head, _, rest = text.partition("{")
    words, _, tail = rest.partition("}")
    names = words.split(",")
    parts = [head + word.removesuffix("?") + tail for word in names]
    return Row(
        module,
        tuple(regex(part if part.endswith("weight") else f"{part}.weight") for part in parts),
        name,
        tuple(map(int, ndims or "2")),
        tuple(i for i, word in enumerate(names) if word.endswith("?")),
    )


_SPELLED = {".": r"\.", "..": r"\.(?:.+\.)?", "...": r"\..+", "*": r"\d+", "(": "(?:"}


def regex(text: str) -> str:
    """A name as the tables write it, as a regular expression.

    `.` is itself, `*` a number, `..` a dot with or without components behind it, `...` all that is
    below a name. `<block>` is a number that is captured under this name, `<stage:text>` whatever the
    text means. All else is as in `re`, where groups do not capture.
    """

    def spelled(found: re.Match[str]) -> str:
        if found["name"]:
            return f"(?P<{found['name']}>{regex(found['of'] or '*')})"
        return _SPELLED.get(found[0], found[0])

    return re.sub(r"<(?P<name>\w+)(?::(?P<of>[^>]+))?>|\[.*?\]|\.{1,3}|[*(]", spelled, text)
