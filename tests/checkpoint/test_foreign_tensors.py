"""Tensors beside the weights that torch, or this package, cannot compute with: untouched, and counted."""

from __future__ import annotations

import warnings

import dimap
import pytest
import torch
from checkpoints import vit
from dimap.checkpoint import open_checkpoint
from dimap.checkpoint.base import Silent
from dimap.checkpoint.inspect import inspect
from dimap.stream import prune_checkpoint
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore", message="(?s).*(Sparse CSR|quantize|packed)")


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.tensor([0.0, 0.5, -0.2]), 0.1, 3, torch.qint8)


FOREIGN = {  # and how many of its elements are not zero
    "float8_e4m3": (torch.tensor([0.0, -0.0, 2.0]).to(torch.float8_e4m3fn), 1),
    "float8_e5m2": (torch.tensor([0.0, 1.0, 2.0]).to(torch.float8_e5m2), 2),
    "float4": (torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), 6),
    "int8": (torch.tensor([0, -1, 2], dtype=torch.int8), 2),
    "uint16": (torch.tensor([0, 1, 2]).to(torch.uint16), 2),
    "uint32": (torch.tensor([0, 1, 2]).to(torch.uint32), 2),
    "uint64": (torch.tensor([0, 0, 2]).to(torch.uint64), 1),
    "complex64": (torch.tensor([0j, 1j, 1]), 2),
    "complex128": (torch.tensor([0j, 1j, 0], dtype=torch.complex128), 1),
    "sparse_coo": (torch.eye(4).to_sparse(), 4),
    "sparse_csr": (torch.eye(4).to_sparse_csr(), 4),
    "qint8": (quantized(), 2),
}
NOT_SAFETENSORS = ("sparse_coo", "sparse_csr", "qint8", "complex128")


def raw(tensor):
    if tensor.layout == torch.sparse_csr or tensor.layout == torch.sparse_coo:
        return tensor.to_dense()
    return tensor.int_repr() if tensor.is_quantized else tensor.contiguous().view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.layout == b.layout and torch.equal(raw(a), raw(b))


@pytest.mark.parametrize("kind", FOREIGN)
def test_passes_through_and_is_counted(tmp_path, kind):
    odd, nonzero = FOREIGN[kind]
    # So that it is taken for a parameter whatever its type.
    name = "head.weight" if odd.ndim > 1 else "norm.weight"
    torch.save({"model": vit() | {name: odd}}, tmp_path / "in.pth")
    done = prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", 0.5)
    want = dimap.select(vit(), 0.5)
    assert sum(done.kept.values()) == sum(int(mask.sum()) for mask in want.values())
    assert done.nonzero[name] == nonzero
    got = torch.load(tmp_path / "out.pth", weights_only=True)["model"][name]
    assert same(got, odd)
    with open_checkpoint(tmp_path / "in.pth") as checkpoint:
        (aux,) = (m for m in inspect(checkpoint, Silent()).modules if m.name == "aux")
    parameters = [p for layer in done.modules["aux"] for p in layer.parameters]
    assert aux.nonzero == sum(done.nonzero[p] for p in parameters)
    if kind in NOT_SAFETENSORS:
        with pytest.raises(ValueError, match=f"{name} must .* ends in .pth keeps it as it is"):
            prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", 0.5)
        assert not (tmp_path / "out.safetensors").exists()
        return
    prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.safetensors", 0.5)
    assert same(load_file(tmp_path / "out.safetensors")[name], odd)
    save_file(vit() | {name: odd}, tmp_path / "in.safetensors")
    streamed = prune_checkpoint(tmp_path / "in.safetensors", tmp_path / "o.safetensors", 0.5)
    assert streamed.nonzero == done.nonzero
    assert (tmp_path / "o.safetensors").read_bytes()  # as every dtype: tested without torch


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sparse_coo", lambda w: w.to_sparse()),
        ("sparse_csr", lambda w: w.to_sparse_csr()),
        ("quantized", lambda w: torch.quantize_per_tensor(w, 0.01, 0, torch.qint8)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_weight_to_prune_must_be_dense_and_is_named(tmp_path, kind, make):
    name = "blocks.0.attn.qkv.weight"
    state = vit()
    state[name] = make(state[name])
    for call in (dimap.prune, dimap.select):
        with pytest.raises(ValueError, match=f"{name} must be a dense tensor .* got {kind}"):
            call(state, 0.5)
    with pytest.raises(ValueError, match=f"{name} must be a dense tensor .* got {kind}"):
        dimap.score(state)
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=f"{name} must be"):
        prune_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", 0.5)
    assert not (tmp_path / "out.pth").exists()
