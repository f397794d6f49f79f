"""Small checkpoints in memory, in files and in folders of shards; what they are compared by."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8, 8: torch.int64}
FORMATS = ["dense", "bitmask", "compact"]  # in which a pruned file is written
CASES = [
    (0.55, {}),
    (0.55, {"scope": "global"}),
    (0.3, {"scope": "layer"}),
    (0.9, {"normalize": "block"}),
    (0.5, {"normalize": "module", "scope": "global"}),
    ({"qkv": 0.2, "proj": 1.0, "mlp": 0.0}, {}),
]


def vit(dtype=torch.float32, width=32, blocks=2, seed=0, step=0.0):
    """A small ViT's state dict; `step` rounds the weights, for ties."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        weights = torch.randn(*shape, generator=generator) * 0.02
        return ((weights / step).round() * step if step else weights).to(dtype)

    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 5, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    for i in range(blocks):
        block = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,)}
        block |= {"norm2.bias": (width,), "attn.qkv.weight": (3 * width, width)}
        block |= {"attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width)}
        block |= {"attn.proj.bias": (width,), "mlp.fc1.weight": (4 * width, width)}
        block |= {"mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width)}
        block |= {"mlp.fc2.bias": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (7, width), "head.bias": (7,)}
    return {name: random(*shape) for name, shape in shapes.items()}


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.itemsize])


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(bits(got[name]), bits(want[name])), name


def shards(path, state, count=3):
    """A folder of shards with an index, another file and a symbolic link, as hubs keep them."""
    path.mkdir()
    names = list(state)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name] for name in names[i::count]}
        save_file(part, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"a": 1}')
    return path


def load_folder(path):
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}
