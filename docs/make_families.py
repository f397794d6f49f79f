"""Write docs/families.md: which models are known by their parameter names, and which are not.

    python docs/make_families.py [--check]

Builds every timm model with attention, and every model type of Transformers, on the meta device:
minutes. README.md gets their numbers. --check compares instead of writing. Needs timm and transformers.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from dimap.families import FAMILIES
from dimap.groups import group, propose
from dimap.groups.roles import LEAST
from torch import nn

PAGE = Path(__file__).with_name("families.md")
README = PAGE.parents[1] / "README.md"
Shapes = dict[str, tuple[int, ...]]

# Classes of timm that attend to tokens or pixels; the others of such names weigh channels.
ATTENTION = re.compile(
    r"Attention|Attn|GPSA|MHSA|SHSA|SHMA|LiteMLA|FocalModulation|Parallel.*Block"
)
CHANNELS = {
    "SelectiveKernelAttn", "SplitAttn", "SpatialAttention", "ChannelAttention", "BatNonLocalAttn",
    "BottleneckAttn", "BilinearAttnTransform",
}  # fmt: skip

INTRO = """# Families

<!-- Written by docs/make_families.py -->

A model is known by the names of its parameters, whatever stands in front of them. Each tower of
blocks, as those for text and for images, is pruned by itself: its modules are called after it,
`text_model.qkv`. What stands outside the blocks is never pruned, and a note says what that was; an
unknown weight inside a block is an error. For other models there are

- `family="transformer"`, `--family transformer`: grouping by the words of the names, which is shown. It
  is refused where it knows the roles of less than 90 % of the weights in the blocks' matrices.
- `patterns=`, `--pattern MODULE=REGEX`, `--patterns FILE.toml`: modules of your own.
- `ignore=`, `--ignore REGEX`: what is never pruned.

Magnitude alone costs decoders of language dearly; their reports say so.
"""


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def verdict(shapes: Shapes) -> str:
    """By which table the model is known, or why it is refused."""
    try:
        families = group(shapes).families
    except ValueError as error:
        lines = str(error).splitlines()
        if "resembles" in lines[0]:
            wrong = lines[1].strip().replace("|", "\\|")
            name = re.search(r"resembles (\S+)", lines[0])
            assert name is not None
            reason = f"differs from `{name[1]}`: {re.sub(r' ?[(].*', '', wrong)}"
        else:
            reason = "no table"
        covered = propose(shapes)[0].covered
        if covered >= LEAST:
            return f"refused: {reason}; `--family transformer` knows it"
        return f"refused: {reason}; the words of its names tell {100 * covered:.0f} % of its blocks"
    names = (f"{tower}: `{f.name}`" if tower else f"`{f.name}`" for tower, f in families.items())
    return ", ".join(names)


def has_attention(model: nn.Module) -> bool:
    names = {type(module).__name__ for module in model.modules()} - CHANNELS
    return any(ATTENTION.search(name) for name in names)


def of_timm(names: Iterable[str] | None = None) -> Iterator[tuple[str, str, Shapes]]:
    """Architecture file, name and shapes of the models that have attention."""
    import timm

    for name in timm.list_models() if names is None else names:
        with torch.device("meta"):
            model = timm.create_model(name)
        if has_attention(model):
            yield type(model).__module__.rpartition(".")[2], name, shapes_of(model)


def of_transformers() -> Iterator[tuple[str, Shapes]]:
    """Type and shapes of the models that can be built from their default configuration."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    mappings = (
        auto.MODEL_FOR_PRETRAINING_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_MAPPING,
    )
    for name, config in transformers.CONFIG_MAPPING.items():
        for mapping in mappings:
            try:
                found: Any = mapping[config]
                one = found[0] if isinstance(found, (list, tuple)) else found
                with torch.device("meta"):
                    model = one(config())
            except Exception:  # needs arguments, a library, the hub: another mapping may do
                continue
            yield name, shapes_of(model)
            break


def named() -> str:
    rows = [f"| `{family.name}` | {family.models} |" for family in FAMILIES]
    return "\n".join(["## By name", "", "| family | models |", "|---|---|", *rows, ""])


def timm_rows() -> dict[tuple[str, str], list[str]]:
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file, name, shapes in of_timm():
        rows[file, verdict(shapes)].append(name)
    return rows


def timm_table() -> str:
    lines = [f"## timm {version('timm')}: every model with attention", ""]
    lines += ["| architecture | known by, or refused | models |", "|---|---|---|"]
    for (file, said), names in sorted(timm_rows().items()):
        lines.append(f"| {file} | {said} | {', '.join(names)} |")
    return "\n".join([*lines, ""])


def transformers_table() -> str:
    rows: dict[str, list[str]] = defaultdict(list)
    roles = count = 0
    for name, shapes in of_transformers():
        rows[verdict(shapes)].append(name)
        roles += propose(shapes)[0].covered >= LEAST
        count += 1
    lines = [f"## Transformers {version('transformers')}: every type that its defaults build", ""]
    lines += [
        f"`--family transformer` knows {roles} of these {count}; convolutional and recurrent "
    ]
    lines[-1] += "networks are among the others."
    lines += ["", "| known by, or refused | types |", "|---|---|"]
    lines += [f"| {said} | {', '.join(names)} |" for said, names in sorted(rows.items())]
    return "\n".join([*lines, ""])


def page() -> str:
    return "\n".join([INTRO, named(), timm_table(), transformers_table()])


def summary(text: str) -> str:
    """How many models a page knows: what README.md says."""
    counts = []
    for part in text.split("\n## ")[2:]:
        rows = [line.strip("| ").split(" | ")[-2:] for line in part.splitlines() if "| " in line][
            1:
        ]
        sizes = [(said.startswith("refused"), len(names.split(", "))) for said, names in rows]
        library = part.split(":")[0]
        known = sum(size for refused, size in sizes if not refused)
        counts.append((library, known, sum(size for _, size in sizes)))
    (timm, *of_timm), (transformers, *of_transformers) = counts
    words = re.search(r"transformer` knows (\d+)", text)
    assert words is not None
    return (
        f"Very likely. {len(FAMILIES)} ways of naming are known, and with them **{of_timm[0]} of the "
        f"{of_timm[1]} models with attention in {timm}**,\nand {of_transformers[0]} of the "
        f"{of_transformers[1]} model types of {transformers}; `--family transformer` knows {words[1]} "
        f"of these {of_transformers[1]}. Among them are Swin, ViT,\nDINO, SAM, CLIP, "
        "BERT, T5, Whisper, Llama and Qwen: [all names](docs/families.md)."
    )


def write_summary(text: str) -> None:
    """Write it between the marks of README.md."""
    old = README.read_text(encoding="utf-8")
    marks = r"(<!-- families -->\n).*?(<!-- /families -->)"
    README.write_text(
        re.sub(marks, lambda m: m[1] + summary(text) + "\n" + m[2], old, flags=re.S),
        encoding="utf-8",
    )


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
        write_summary(text)
        return 0
    old = PAGE.read_text(encoding="utf-8").splitlines()
    for was, is_now in itertools.zip_longest(old, text.splitlines()):
        if was != is_now:
            print(f"docs/families.md is not up to date:\n- {was}\n+ {is_now}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
