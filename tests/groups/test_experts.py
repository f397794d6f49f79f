"""Experts: each is a layer of its own, stacked in one tensor or in a tensor each."""

from __future__ import annotations

import copy
import pickle

import dimap
import pytest
import torch
from checkpoints import FORMATS
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.inspect import inspect
from dimap.checkpoint.prune import prune_checkpoint
from dimap.groups import Slice, part_of, whole
from dimap.groups.identity import same_weights
from dimap.masks import fit_masks
from safetensors.torch import save_file
from torch import Tensor

EXPERTS, HIDDEN, INNER = 3, 8, 12
STACKED = "model.layers.{}.mlp.experts."


def dense(generator: torch.Generator, block: int) -> dict[str, Tensor]:
    start = f"model.layers.{block}."
    shapes = {f"self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {"mlp.gate.weight": (EXPERTS, HIDDEN), "input_layernorm.weight": (HIDDEN,)}
    return {start + n: torch.randn(s, generator=generator) for n, s in shapes.items()}


def mixtral() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same weights as in memory and as on disk."""
    generator = torch.Generator().manual_seed(0)
    memory: dict[str, Tensor] = {"model.embed_tokens.weight": torch.randn(16, HIDDEN)}
    disk = dict(memory)
    for block in range(2):
        for name, tensor in dense(generator, block).items():
            memory[name] = tensor
            disk[name.replace("mlp.gate", "block_sparse_moe.gate")] = tensor
        gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)
        gate_up[1] *= 3  # experts of different scale: a layer of all would rank them otherwise
        down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)
        down[2, :, 0] = 0.5  # ties, within an expert
        memory[STACKED.format(block) + "gate_up_proj"] = gate_up
        memory[STACKED.format(block) + "down_proj"] = down
        for e in range(EXPERTS):
            start = f"model.layers.{block}.block_sparse_moe.experts.{e}."
            disk[start + "w1.weight"], disk[start + "w3.weight"] = gate_up[e].chunk(2)
            disk[start + "w2.weight"] = down[e]
    return memory, {name: tensor.contiguous() for name, tensor in disk.items()}


def as_disk(masks: dict[str, Tensor], disk: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for block in range(2):
        for e in range(EXPERTS):
            start = f"model.layers.{block}.block_sparse_moe.experts.{e}."
            stacked = STACKED.format(block)
            found[start + "w1.weight"], found[start + "w3.weight"] = masks[
                stacked + "gate_up_proj"
            ][e].chunk(2)
            found[start + "w2.weight"] = masks[stacked + "down_proj"][e]
    return found | {name: mask for name, mask in masks.items() if name in disk}


SCOPES = [("module", "layer"), ("global", "layer"), ("layer", "layer"), ("block", "module")]


@pytest.mark.parametrize(("scope", "normalize"), SCOPES)
def test_memory_and_disk_give_the_same_masks(scope, normalize):
    memory, disk = mixtral()
    options = {"scope": scope, "normalize": normalize}
    ours = dimap.select(memory, 0.6, **options)
    theirs = dimap.select(disk, 0.6, **options)
    assert ours[STACKED.format(0) + "down_proj"].shape == (EXPERTS, HIDDEN, INNER)
    moved = as_disk(ours, disk)
    assert moved.keys() == theirs.keys()
    assert all(torch.equal(moved[name], theirs[name]) for name in theirs)


def test_an_expert_is_a_layer_of_its_own():
    memory, _ = mixtral()
    layers = dimap.find_modules(memory)["mlp"]
    assert len(layers) == 2 * EXPERTS * 2
    assert layers[0].name == "model.layers.0.mlp.experts.gate_up_proj[0]"
    assert layers[0].parameters == (Slice("model.layers.0.mlp.experts.gate_up_proj", 0),)
    scores = dimap.score(memory)
    name = STACKED.format(1) + "down_proj"
    alone = torch.ops.dimap.score([memory[name][2].contiguous()], [0])[0]
    assert torch.equal(scores[name][2], alone)
    assert "model.layers.0.mlp.gate.weight" not in scores


def test_experts_stored_in_by_out_and_their_biases_are_known():
    """As gpt-oss stores them: the biases have two dimensions and are not pruned."""
    generator = torch.Generator().manual_seed(1)
    state = dense(generator, 0)
    state["model.layers.0.mlp.router.weight"] = state.pop("model.layers.0.mlp.gate.weight")
    for name, sizes in (("gate_up", (HIDDEN, 2 * INNER)), ("down", (INNER, HIDDEN))):
        state[STACKED.format(0) + f"{name}_proj"] = torch.randn(EXPERTS, *sizes)
        state[STACKED.format(0) + f"{name}_proj_bias"] = torch.randn(EXPERTS, sizes[1])
    for family in (None, "transformer"):
        masks = dimap.select(state, 0.5, family=family)
        assert not any("bias" in name or "router" in name for name in masks)
        assert masks[STACKED.format(0) + "gate_up_proj"].shape == (EXPERTS, HIDDEN, 2 * INNER)


def test_in_place_and_report():
    memory, _ = mixtral()
    before = {name: tensor.clone() for name, tensor in memory.items()}
    masks = dimap.select(memory, 0.5)
    pruning = dimap.prune(memory, 0.5)
    for name, mask in masks.items():
        assert torch.equal(memory[name], before[name] * mask)
    report = pruning.report()
    assert {m.name: m.layers for m in report.modules} == {"qkv": 2, "proj": 2, "mlp": 12, "aux": 5}
    assert sum(layer.weights for layer in report.layers if layer.module == "mlp") == (
        2 * EXPERTS * 3 * HIDDEN * INNER
    )
    mlp = next(m for m in report.modules if m.name == "mlp")
    assert mlp.kept == mlp.nonzero == mlp.weights // 2
    assert any("costs language models dearly" in note for note in report.notes)


@pytest.mark.parametrize("form", FORMATS)
def test_streamed_as_in_memory(tmp_path, form):
    memory, _ = mixtral()
    save_file(memory, tmp_path / "in.safetensors")
    pruned = prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        0.6,
        masks=tmp_path / "masks.safetensors",
        format=form,
    )
    masks = dimap.select(memory, 0.6)
    out = dimap.load_file(tmp_path / "out.safetensors")
    found = dimap.load_masks(tmp_path / "masks.safetensors")
    assert list(found) == list(masks)
    for name, tensor in memory.items():
        want = tensor * masks[name] if name in masks else tensor
        assert torch.equal(out[name], want)
        assert name not in masks or torch.equal(found[name], masks[name])
    assert pruned.report().kept == dimap.prune(memory, 0.6).report().kept
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        counted = inspect(checkpoint, Silent())
    layers = {layer.name: layer for module in counted.modules for layer in module.layers}
    for layer in dimap.find_modules(memory)["mlp"]:
        kept = sum(int(part_of(masks, p).count_nonzero()) for p in layer.parameters)
        assert layers[layer.name].nonzero == kept


def test_bits_that_would_begin_within_a_byte_are_refused(tmp_path):
    memory, _ = mixtral()
    for name in [name for name in memory if name.endswith("down_proj")]:
        memory[name] = memory[name][:, :5, :5].contiguous()
    save_file(memory, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"down_proj\[0\] must have a multiple of 8 weights"):
        prune_checkpoint(
            tmp_path / "in.safetensors",
            tmp_path / "o.safetensors",
            0.5,
            masks=tmp_path / "m.safetensors",
        )
    prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5)
    masks = dimap.select(memory, 0.5)
    out = dimap.load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(out[name], memory[name] * masks[name]) for name in masks)


def test_masks_fit_from_one_form_to_the_other():
    memory, disk = mixtral()
    masks = dimap.select(memory, 0.6)
    there = fit_masks(masks, disk)
    want = as_disk(masks, disk)
    assert there.keys() == want.keys()
    assert all(torch.equal(there[name], want[name]) for name in want)
    back = fit_masks(there, memory)
    assert back.keys() == masks.keys()
    assert all(torch.equal(back[name], masks[name]) for name in masks)


def test_a_saliency_is_ranked_expert_by_expert():
    memory, _ = mixtral()
    values = {name: tensor.abs() for name, tensor in memory.items()}
    masks = dimap.select(memory, 0.5, saliency=values, normalize="layer")
    want = dimap.select(memory, 0.5)
    assert all(torch.equal(masks[name], want[name]) for name in want)
    name = STACKED.format(0) + "down_proj"
    with pytest.raises(ValueError, match=r"down_proj\[0\] must have shape"):
        dimap.select(memory, 0.5, saliency=values | {name: values[name][:, :2]})


def test_ignored_with_all_experts_or_not_at_all():
    memory, _ = mixtral()
    name = STACKED.format(0) + "down_proj"
    masks = dimap.select(memory, 0.5, ignore=name.replace(".", r"\."))
    assert name not in masks
    assert STACKED.format(1) + "down_proj" in masks
    with pytest.raises(ValueError, match="all layers of a tensor that stacks them, or none"):
        dimap.select(memory, 0.5, ignore=r".*layers\.0.*down_proj\[1\]")


def test_a_slice_keeps_what_it_is_when_copied():
    one = Slice("experts.down_proj", 3)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (other, whole(other), other.at) == ("experts.down_proj[3]", "experts.down_proj", 3)


def test_same_weights_of_stacked_and_single_experts():
    memory, disk = ({n: tuple(t.shape) for n, t in state.items()} for state in mixtral())
    names = [n for n in memory if "experts" in n]
    pairs = same_weights({n: memory[n] for n in [*names, *dimap.select(mixtral()[0], 0)]}, disk)
    stacked = next(p for p in pairs if p.given == (STACKED.format(0) + "down_proj",))
    assert [n.split(".")[-2] for n in stacked.wanted] == ["w2"] * EXPERTS
