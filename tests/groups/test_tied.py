"""A weight is its storage, not its name: tied weights are ranked and counted once."""

from __future__ import annotations

import dimap
import pytest
import torch
from commands import runner
from dimap.groups import AUX, tied_in
from torch import nn

timm_vit = pytest.importorskip("timm.models.vision_transformer")


def vit(depth=3, **options):
    torch.manual_seed(0)
    return timm_vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=5, **options
    )


def recurrent(depth=3):
    """ALBERT's way: one block that is used several times."""
    model = vit(depth)
    for i in range(1, depth):
        model.blocks[i] = model.blocks[0]
    return model


def prunable(modules):
    return [p for m, layers in modules.items() if m != AUX for x in layers for p in x.parameters]


@pytest.mark.parametrize("form", ["model", "state dict"])
def test_a_block_that_is_used_three_times_is_one(form):
    model = recurrent()
    given = model if form == "model" else model.state_dict()
    pruning = dimap.prune(given, 0.5)
    assert list(pruning.masks) == prunable(dimap.find_modules(recurrent(1)))
    single = recurrent(1)
    single.load_state_dict(recurrent().state_dict(), strict=False)
    once = dimap.prune(single, 0.5)
    for name, mask in pruning.masks.items():
        assert torch.equal(mask, once.masks[name])
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name in pruning.masks:  # masked alike under every name
        for i in range(3):
            other = name.replace("blocks.0.", f"blocks.{i}.")
            assert torch.equal(weights[other] != 0, pruning.masks[name])
    report = pruning.report()
    assert report.weights == sum(p.numel() for p in model.parameters())
    if form == "state dict":
        assert any("ranked and counted once: 24 parameters" in note for note in report.notes)


def test_a_weight_tied_to_one_that_is_never_pruned_is_never_pruned():
    model = vit(2)
    model.head = nn.Linear(32, 64, bias=False)
    model.head.weight = model.blocks[1].mlp.fc1.weight = nn.Parameter(torch.randn(64, 32))
    model.blocks[1].mlp.fc1 = nn.Linear(32, 64)
    model.blocks[1].mlp.fc1.weight = model.head.weight
    before = model.head.weight.clone()
    for given in (model, model.state_dict()):
        pruning = dimap.prune(given, 0.5)
        assert "blocks.1.mlp.fc1.weight" not in pruning.masks
        assert torch.equal(model.head.weight, before)
        assert any("never pruned, being tied" in note for note in pruning.report().notes)


def test_files_of_torch_save_keep_ties(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = recurrent().bfloat16()
    torch.save(model.state_dict(), "in.pth")
    run = runner(capsys)
    command = ("prune", "in.pth", "out.pth", "-s", 0.6, "--masks", "masks.safetensors")
    code, _, err = run(*command)
    assert code == 0, err
    out, masks = torch.load("out.pth"), dimap.load_masks("masks.safetensors")
    want = dimap.select(model.state_dict(), 0.6)
    assert masks.keys() == want.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, want[name])
        assert torch.equal(out[name] != 0, mask)
    assert out["blocks.0.mlp.fc1.weight"].data_ptr() == out["blocks.2.mlp.fc1.weight"].data_ptr()
    dimap.hold_masks(model, masks, torch.optim.SGD(model.parameters(), 0.1))
    assert "ranked and counted once" in run("inspect", "in.pth")[1]


def test_what_counts_as_tied():
    fused = torch.randn(12, 4)
    q, k, v = fused.chunk(3)
    assert tied_in({"q.weight": q, "k.weight": k, "v.weight": v}) == []
    columns = fused.chunk(2, 1)  # woven into each other, and apart
    assert tied_in({"a.weight": columns[0], "b.weight": columns[1]}) == []
    assert tied_in({"a.weight": fused, "b.weight": fused.view(12, 4)}) == [("a.weight", "b.weight")]
    assert tied_in({"a.weight": torch.empty(0, 4), "b.weight": torch.empty(0, 4)}) == []
    assert tied_in({"a.weight": fused, "b.weight": fused.clone()}) == []
    with pytest.raises(ValueError, match=r"b\.weight must be the same weights or share no memory"):
        tied_in({"a.weight": fused, "b.weight": fused[1:]})
    with torch.device("meta"):
        assert tied_in(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
