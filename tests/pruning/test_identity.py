"""Masks fit the same model under any spelling of its names."""

from __future__ import annotations

import dimap
import pytest
import torch
import torch.distributed as dist
from dimap.masks import fit_masks
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

transformers = pytest.importorskip("transformers")
timm_swin = pytest.importorskip("timm.models.swin_transformer")
timm_vit = pytest.importorskip("timm.models.vision_transformer")
timm_beit = pytest.importorskip("timm.models.beit")

SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4]}
VIT = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip


def swin(depths=(1, 2)):
    return timm_swin.SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=depths, num_heads=(2, 4), window_size=4
    )


def vit():
    return timm_vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, mlp_ratio=2
    )


def hf_swin():
    return transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, window_size=4))


def hf_vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))


def random_masks(model):
    generator = torch.Generator().manual_seed(0)
    shapes = {name: m.shape for name, m in dimap.select(model, 0.5).items()}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def weights_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


def layers(model, masks):
    """Masks of each layer put together, in the order of modules, stages and blocks."""
    modules = dimap.find_modules(model)
    return [
        torch.cat([masks[name] for name in layer.parameters])
        for module, found in modules.items()
        if module != "aux"
        for layer in found
    ]


class Wrapped(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for i, stage in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(stage)
    return model


WRAPPERS = {
    "torch.compile": torch.compile,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "activation checkpoints": checkpointed,
    "Lightning": lambda model: Wrapped(model=model),
    "a detector": lambda model: Wrapped(backbone=Wrapped(bottom_up=model), head=nn.Linear(3, 4)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("partial", [False, True])
def test_wrapped_and_plain_names_mean_the_same_weights(wrap, partial):
    masks = random_masks(swin())
    if partial:  # of one block: those of others have the same endings
        masks = {
            name: mask for name, mask in masks.items() if name.startswith("layers.1.blocks.1.")
        }
    wrapped = weights_of(wrap(swin()))
    there = fit_masks(masks, wrapped)
    assert set(there) <= set(wrapped)
    assert all(torch.equal(a, b) for a, b in zip(there.values(), masks.values(), strict=True))
    back = fit_masks(there, weights_of(swin()))
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[name], masks[name]) for name in masks)


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_sharded])
def test_masks_hold_in_data_parallel_models(one_process, wrap):
    masks, model = random_masks(swin()), wrap(swin())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with dimap.hold_masks(model, masks, optimizer) as holding:
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        assert holding.masks.keys() == masks.keys()
    weights = fit_masks(masks, weights_of(model))
    for (name, mask), given in zip(weights.items(), masks.values(), strict=True):
        assert torch.equal(mask, given)
        assert not weights_of(model)[name][~mask].any()


@pytest.mark.parametrize(
    ("one", "other"), [(swin, hf_swin), (hf_swin, swin), (vit, hf_vit), (hf_vit, vit)]
)
def test_names_of_another_library_fused_or_split(one, other):
    masks = random_masks(one())
    there = fit_masks(masks, weights_of(other()))
    assert set(there) == set(dimap.select(other(), 0.5))
    for a, b in zip(layers(one(), masks), layers(other(), there), strict=True):
        assert torch.equal(a, b)


def test_every_call_takes_another_spelling(tmp_path):
    plain, wrapped = vit(), torch.compile(vit())
    pruning = dimap.prune(wrapped, 0.5)
    pruning.save_masks(tmp_path / "m.safetensors")
    for masks in (pruning.masks, dimap.load_masks(tmp_path / "m.safetensors")):
        model = hf_vit()
        dimap.apply_masks(model, masks)
        kept = sum(int(mask.sum()) for mask in pruning.masks.values())
        weights = weights_of(model)
        assert sum(int(weights[n].count_nonzero()) for n in dimap.select(model, 0)) == kept
        with dimap.hold_masks(plain, masks, torch.optim.SGD(plain.parameters(), 0.1)) as holding:
            assert set(holding.masks) == set(dimap.select(plain, 0))


def test_addresses_of_a_file_fit_names_that_no_family_knows(tmp_path):
    """Own patterns say where a layer stands; a known family's names are found from that."""

    def rename(name):
        return name.replace("blocks", "b").replace("attn", "a").replace("fc", "f")

    state = {rename(name): p.clone() for name, p in vit().state_dict().items()}
    patterns = {
        "qkv": r"b\.(?P<block>\d+)\.a\.qkv\.weight",
        "proj": r"b\.(?P<block>\d+)\.a\.proj\.weight",
        "mlp": [rf"b\.(?P<block>\d+)\.mlp\.f{i}\.weight" for i in (1, 2)],
    }
    pruning = dimap.prune(state, 0.5, patterns=patterns)
    pruning.save_masks(tmp_path / "m.safetensors")
    masks = dimap.load_masks(tmp_path / "m.safetensors")
    there = fit_masks(masks, weights_of(vit()))
    for name, mask in there.items():
        assert torch.equal(masks[rename(name)], mask)
    with pytest.raises(ValueError, match=r"none called b\.0\.a\.qkv\.weight and 11 more"):
        fit_masks(dict(masks), weights_of(vit()))


def test_towers_that_files_call_otherwise(tmp_path):
    """A library writes the towers of a model under other names than it gives them in memory."""
    image = {**VIT, "num_hidden_layers": 2}
    words = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 50,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**image),
        text_config=transformers.LlamaConfig(**words),
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "in")
    file = tmp_path / "m.safetensors"
    dimap.prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.5, masks=file)
    want = dimap.select(model, 0.5)
    on_disk = dimap.load_masks(file)
    assert want.keys() != on_disk.keys()
    fitted = fit_masks(on_disk, weights_of(model))
    assert fitted.keys() == want.keys()
    assert all(torch.equal(fitted[name], want[name]) for name in want)
    back = fit_masks(want, dimap.load_file(tmp_path / "in" / "model.safetensors"))
    assert all(torch.equal(back[name], on_disk[name]) for name in on_disk)


def test_gradual_pruning_of_a_wrapped_model():
    model = torch.compile(swin())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = dimap.CubicSchedule(0.6, 0, 3)
    gradual = dimap.GradualPruning(model, optimizer, schedule)
    for _ in range(3):
        gradual.step()
    kept = {name: int(mask.sum()) for name, mask in gradual.masks.items()}
    total = {name: mask.numel() for name, mask in gradual.masks.items()}
    assert abs(1 - sum(kept.values()) / sum(total.values()) - 0.6) < 1e-3


def test_masks_that_fit_two_towers_are_refused():
    masks = random_masks(vit())
    model = Wrapped(student=vit(), teacher=vit())
    with pytest.raises(ValueError, match=r"any of student\.blocks\S+, teacher\.blocks"):
        fit_masks(masks, weights_of(model))
    named = {f"teacher.{name}": mask for name, mask in masks.items()}
    assert fit_masks(named, weights_of(model)).keys() == named.keys()


def test_masks_of_another_model_are_refused_and_nothing_is_changed():
    masks = random_masks(swin((2, 2)))
    model = swin()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"none called .*layers\.0\.blocks\.1.* the nearest of its"
    ):
        dimap.apply_masks(model, masks)
    wide = hf_vit()
    with pytest.raises(ValueError, match="must have"):
        dimap.apply_masks(wide, {name: mask[:, :-1] for name, mask in random_masks(vit()).items()})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
