"""Write the lists of names and shapes by which test_groups.py checks the families.

    python tests/groups/data/families/generate.py [CASE ...]

Each list is what the library itself gives for a model built on the meta device, or (`*_disk`) what
it writes with save_pretrained; the models are small but keep every kind of name. Needs timm,
torchvision, transformers and safetensors; the tests do not, they read the lists. One file per case:

    {"case": …, "library": "timm 1.0.31", "buffers": [names], "tensors": {name: shape}}

in the order of the state dict or of the file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

FOLDER = Path(__file__).parent
DEPTHS = (1, 1, 11, 1)  # 11, for "10" sorts before "2"
HEADS = (1, 2, 4, 8)


class Listed(dict[str, Any]):
    """What one file holds, but for the case."""


def listed(library: str, model: nn.Module) -> Listed:
    parameters = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    return Listed(
        library=f"{library} {version(library)}",
        buffers=[name for name in state if name not in parameters],
        tensors={name: list(tensor.shape) for name, tensor in state.items()},
    )


def from_timm(name: str, **options: Any) -> Listed:
    import timm

    with torch.device("meta"):
        return listed("timm", timm.create_model(name, **{"num_classes": 10, **options}))


def timm_swin(name: str) -> Listed:
    return from_timm(name, embed_dim=8, depths=DEPTHS, num_heads=HEADS)


def torchvision_swin(v2: bool) -> Listed:
    from torchvision.models import swin_transformer as swin

    options: dict[str, Any] = {}
    if v2:
        options = {
            "block": swin.SwinTransformerBlockV2,
            "downsample_layer": swin.PatchMergingV2,
        }
    with torch.device("meta"):
        model = swin.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=8,
            depths=list(DEPTHS),
            num_heads=list(HEADS),
            window_size=[4, 4],
            num_classes=10,
            **options,
        )
    return listed("torchvision", model)


def torchvision_vit() -> Listed:
    from torchvision.models import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(
            image_size=32,
            patch_size=16,
            num_layers=11,
            num_heads=1,
            hidden_dim=8,
            mlp_dim=16,
            num_classes=10,
        )
    return listed("torchvision", model)


def from_hf(model: str, config: str, disk: bool, **options: Any) -> Listed:
    import transformers
    from safetensors import safe_open

    built = getattr(transformers, model)(getattr(transformers, config)(num_labels=10, **options))
    if not disk:
        return listed("transformers", built)
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
            names = file.keys()
            tensors = {name: file.get_slice(name).get_shape() for name in names}
    library = f"transformers {version('transformers')}"
    return Listed(library=library, buffers=[], tensors=tensors)


def hf_swin(model: str, disk: bool) -> Listed:
    return from_hf(
        f"{model}ForImageClassification",
        f"{model}Config",
        disk,
        embed_dim=8,
        depths=list(DEPTHS),
        num_heads=list(HEADS),
        image_size=64,
        window_size=4,
    )


def hf_vit(model: str, disk: bool, head: str = "ForImageClassification", **options: Any) -> Listed:
    return from_hf(
        model + head,
        f"{model}Config",
        disk,
        hidden_size=8,
        num_hidden_layers=11,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        **options,
    )


def microsoft_swin() -> Listed:
    """Swin-T as the original files name it, from timm's names.

    The original merges at the end of a stage, not at the start of the next (the same place in the
    order), calls the head `head`, and stores two buffers: an index in every block, and a mask in
    the blocks whose windows are shifted: every second one, but not in the last stage, which is a
    single window.
    """
    tensors: dict[str, list[int]] = {}
    buffers = []
    for name, shape in from_timm("swin_tiny_patch4_window7_224")["tensors"].items():
        words = name.split(".")
        if "downsample" in words:
            words[1] = str(int(words[1]) - 1)
        if name.endswith("norm1.weight") and int(words[3]) % 2 and int(words[1]) < 3:
            buffers.append(".".join([*words[:4], "attn_mask"]))
            tensors[buffers[-1]] = [(8 // 2 ** int(words[1])) ** 2, 49, 49]
        tensors[".".join(words).replace("head.fc.", "head.")] = shape
        if name.endswith("relative_position_bias_table"):
            buffers.append(name.replace("bias_table", "index"))
            tensors[buffers[-1]] = [49, 49]
    library = "the original Swin's names, from timm's"
    return Listed(library=library, buffers=buffers, tensors=tensors)


CASES: dict[str, Callable[[], Listed]] = {
    "timm_swin_tiny": lambda: from_timm("swin_tiny_patch4_window7_224", num_classes=1000),
    "timm_swin_s3": lambda: timm_swin("swin_s3_tiny_224"),
    "timm_swinv2": lambda: timm_swin("swinv2_tiny_window8_256"),
    "timm_swinv2_cr": lambda: timm_swin("swinv2_cr_tiny_ns_224"),
    "timm_vit": lambda: from_timm("vit_tiny_patch16_224", embed_dim=24, depth=11),
    "timm_deit_distilled": lambda: from_timm(
        "deit_tiny_distilled_patch16_224", embed_dim=24, depth=11
    ),
    "timm_deit3": lambda: from_timm("deit3_small_patch16_224", embed_dim=24, depth=2),
    "timm_beit": lambda: from_timm("beit_base_patch16_224", embed_dim=24, depth=2),
    "torchvision_swin": lambda: torchvision_swin(v2=False),
    "torchvision_swin_v2": lambda: torchvision_swin(v2=True),
    "torchvision_vit": torchvision_vit,
    "hf_swin": lambda: hf_swin("Swin", disk=False),
    "hf_swin_disk": lambda: hf_swin("Swin", disk=True),
    "hf_swinv2": lambda: hf_swin("Swinv2", disk=False),
    "hf_swinv2_disk": lambda: hf_swin("Swinv2", disk=True),
    "hf_vit": lambda: hf_vit("ViT", disk=False),
    "hf_vit_disk": lambda: hf_vit("ViT", disk=True),
    "hf_deit": lambda: hf_vit("DeiT", False, "ForImageClassificationWithTeacher"),
    "hf_deit_disk": lambda: hf_vit("DeiT", True, "ForImageClassificationWithTeacher"),
    "hf_beit": lambda: hf_vit("Beit", False, use_relative_position_bias=True),
    "hf_beit_disk": lambda: hf_vit("Beit", True, use_relative_position_bias=True),
    "microsoft_swin_tiny": microsoft_swin,
}


def write(case: str) -> None:
    made = CASES[case]()
    tensors = ",\n".join(f"  {json.dumps(n)}: {json.dumps(s)}" for n, s in made["tensors"].items())
    text = (
        f'{{"case": {json.dumps(case)},\n "library": {json.dumps(made["library"])},\n'
        f' "buffers": {json.dumps(made["buffers"])},\n "tensors": {{\n{tensors}\n }}}}\n'
    )
    Path(FOLDER, f"{case}.json").write_text(text)


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        write(case)
        print(case)
