"""MONAI's SwinUNETR, a Swin for volumes inside a segmenter: pruned by the command, reloaded, and run."""

from __future__ import annotations

import dimap
import pytest
import torch
from commands import runner
from safetensors.torch import save_file


def test_swin_unetr_is_pruned_reloaded_and_run(capsys, tmp_path, monkeypatch) -> None:
    pytest.importorskip("einops")
    nets = pytest.importorskip(
        "monai.networks.nets"
    )  # takes seconds: here, for the worker that runs it
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    torch.save(model.state_dict(), "in.pt")
    save_file(model.state_dict(), "in.safetensors")
    code, out, err = runner(capsys)("prune", "in.pt", "out.pt", "-s", 0.55)
    assert code == 0, err
    assert "never pruned, being outside the blocks of monai_swin" in " ".join(out.split())
    dimap.prune_checkpoint("in.safetensors", "out.safetensors", 0.55)  # streamed
    pruning = dimap.prune(model, 0.55)
    assert {name: len(layers) for name, layers in pruning.modules.items() if name != "aux"} == {
        "qkv": 8, "proj": 8, "mlp": 16,
    }  # fmt: skip
    again = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    again.load_state_dict(torch.load("out.pt", weights_only=True))
    streamed = dimap.load_file("out.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(streamed[name], tensor), name
    with torch.no_grad():
        assert again.eval()(torch.randn(1, 1, 64, 64, 64)).isfinite().all()
