"""Distortions of modules and layers from a survey, beside prunings of each alone."""

from __future__ import annotations

import dimap
import pytest
import torch
from checkpoints import DTYPES, vit
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.sensitivity import measure_checkpoint
from dimap.plots import sensitivity_curves
from safetensors.torch import save_file


def distortion(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    lost = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(before, after, strict=True)
    )
    return (lost / sum(float(a.double().square().sum()) for a in before)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("step", [0.0, 0.01], ids=["distinct", "ties"])
def test_distortions_are_those_of_prunings_alone(dtype, step) -> None:
    state = vit(dtype, width=64, step=step)
    state["blocks.1.mlp.fc1.weight"].mul_(2)
    found = dimap.measure_sensitivity(state)
    assert [curve.name for curve in found.modules] == ["qkv", "proj", "mlp"]
    for percent in (0, 7, 50, 93, 100):
        share = percent / 100
        pruned = {name: tensor.clone() for name, tensor in state.items()}
        pruning = dimap.prune(pruned, share)
        for curve in found.modules:
            names = [p for layer in pruning.modules[curve.name] for p in layer.parameters]
            want = distortion([state[n] for n in names], [pruned[n] for n in names])
            assert curve.distortion[percent] == pytest.approx(want, abs=2e-2 if step else 2e-3)
            assert curve.weights == sum(state[n].numel() for n in names)
        alone = {name: tensor.clone() for name, tensor in state.items()}
        dimap.prune(alone, share, scope="layer")
        for curve in found.layers:
            name = f"{curve.name}.weight"
            want = distortion([state[name]], [alone[name]])
            assert curve.distortion[percent] == pytest.approx(want, abs=2e-2 if step else 2e-3)


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_files_have_the_curves_of_the_loaded_weights(tmp_path, form) -> None:
    state, path = vit(torch.bfloat16), tmp_path / f"in.{form}"
    save_file(state, path) if form == "safetensors" else torch.save(state, path)
    with open_checkpoint(path) as checkpoint:
        found = measure_checkpoint(checkpoint, Silent())
    assert found == dimap.measure_sensitivity(state)
    assert found.to_dict()["schema"] == "dimap.sensitivity"
    sensitivity_curves(found, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_a_layer_of_zeros_loses_nothing() -> None:
    state = vit()
    state["blocks.0.attn.proj.weight"].zero_()
    (curve,) = (
        c for c in dimap.measure_sensitivity(state).layers if c.name == "blocks.0.attn.proj"
    )
    assert set(curve.distortion) == {0.0}
