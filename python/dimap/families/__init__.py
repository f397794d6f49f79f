"""The model families that dimap knows by their parameter names: data only, read by `groups`.

Every pattern is a regular expression that must match a whole name (`re.fullmatch`), never a part
of one: `meta_mlp.fc1` ends in `mlp.fc1`, `attention.output.dense` in `output.dense`. Before any
family is tried, components in `WRAPPERS` are dropped wherever they stand, and names in `BUFFERS`
are set aside. A family's patterns are then read as

    rows, block_aux:  prefix + block + pattern        aux:  prefix + pattern

where prefix is whatever stands before a tower of blocks: `backbone.`, `1.`, `visual.trunk.`. Each
prefix is a tower of its own, and the first family of `FAMILIES` that fits a tower is its family.

A family fits if every parameter of two or more dimensions inside the blocks is claimed, by a row (to
be pruned) or by `block_aux` (never pruned), and every block has as many layers as `per_block` says.
What stands outside the blocks is never pruned. Biases, norms and other parameters of fewer
dimensions are aux without being named. To add a family, add an entry to
a table, which writes it in short, by `table.family`; a new table goes into `FAMILIES`.

Models of no family can be grouped by the words in their names: `roles`.
"""

from __future__ import annotations

from . import hierarchical, language, swin, vit
from .table import Counts, Family, Row

__all__ = ["BESIDE", "BUFFERS", "FAMILIES", "WRAPPERS", "Counts", "Family", "Row"]

# Components that wrappers insert into names: torch.compile, FSDP, activation checkpointing, PEFT.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer")

# Entries of a state dict that are no parameters; an nn.Module does not list them as such.
BUFFERS = (
    r"(?:.+\.)?(?:relative_position_index|relative_coords_table|attn_mask)",
    r"(?:.+\.)?(?:running_mean|running_var|num_batches_tracked)",
)

# Parts of detectors and segmenters that stand beside a backbone and are not pruned with it, though
# some of them are made of transformer blocks.
BESIDE = (
    r"(?:.+\.)?(?:neck|fpn|decode_head|auxiliary_head|bbox_head|mask_head|panoptic_head"
    r"|sem_seg_head|pixel_decoder|transformer_decoder|transformer_module|query_transformer"
    r"|mask_decoder|prompt_encoder|memory_attention)\..*",
    r"(?:.+\.)?pixel_level_module\.decoder\..*",
)

FAMILIES: tuple[Family, ...] = (
    *swin.FAMILIES,
    *vit.FAMILIES,
    *hierarchical.FAMILIES,
    *language.FAMILIES,
)
