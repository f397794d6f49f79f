"""Pruned weights stay exactly zero through training, whatever trains them."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import dimap
import pytest
import torch
import torch.nn.functional as F
from ranks import Group
from torch import Tensor, nn


class Micro(nn.Module):
    """Two MLP blocks and a head; float32, a few hundred weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
            for _ in range(2)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def micro(seed: int = 0) -> tuple[Micro, dict[str, Tensor]]:
    """A model, and masks that drop about half of the weights of its blocks."""
    torch.manual_seed(seed)
    model = Micro()
    names = [n for n, p in model.named_parameters() if n.startswith("blocks") and p.ndim == 2]
    return model, {n: torch.rand(model.get_parameter(n).shape) < 0.5 for n in names}


def batch(i: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(i)
    return torch.randn(8, 12, generator=rng), torch.randint(4, (8,), generator=rng)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, start: int = 0
) -> None:
    for i in range(start, start + steps):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def assert_held(weights: Any, masks: dict[str, Tensor]) -> None:
    """Exactly +0 where dropped (all bits are zero), and trained where kept."""
    for name, mask in masks.items():
        bits = weights[name].detach().float().view(torch.int32)
        assert not bits[~mask].any(), name
        assert bits[mask].any(), name


def assert_state_zero(optimizer: torch.optim.Optimizer, held: dimap.Holding, model: nn.Module):
    seen = 0
    for name, mask in held.masks.items():
        p = model.get_parameter(name)
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                assert not value[~mask].any(), name
                assert value[mask].any(), name
                seen += 1
    assert seen


ADAMW = torch.optim.AdamW
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: ADAMW(ps, lr=0.01, foreach=False),
    "adamw-foreach": lambda ps: ADAMW(ps, lr=0.01, foreach=True),
    "adamw-fused": lambda ps: ADAMW(ps, lr=0.01, fused=True),
    "adamw-weight-decay": lambda ps: ADAMW(ps, lr=0.01, weight_decay=0.3),
    "adam-coupled-decay-amsgrad": lambda ps: torch.optim.Adam(
        ps, lr=0.01, weight_decay=0.3, amsgrad=True
    ),
    "sgd-momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=False),
    "sgd-momentum-foreach": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=True),
    "sgd-momentum-fused": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "sgd-nesterov-decay": lambda ps: torch.optim.SGD(
        ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("gradients", [True, False], ids=["masked-gradients", "dense-gradients"])
def test_zero_after_every_step(make, gradients: bool) -> None:
    model, masks = micro()
    optimizer = make(model.parameters())
    held = dimap.hold_masks(model, masks, optimizer, gradients=gradients)
    for i in range(4):
        train(model, optimizer, steps=1, start=i)
        assert_held(model.state_dict(), masks)
        for name, mask in masks.items():
            grad = model.get_parameter(name).grad
            assert bool(grad[~mask].any()) != gradients
    if gradients:
        assert_state_zero(optimizer, held, model)


def test_what_is_kept_trains_as_if_the_dropped_were_not_there() -> None:
    model, masks = micro()
    other = copy.deepcopy(model)
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    # The same by multiplying weights, as wrappers of parameters do.
    reference = ADAMW(other.parameters(), lr=0.01)
    dimap.apply_masks(other, masks)
    for i in range(3):
        x, y = batch(i)
        reference.zero_grad()
        F.cross_entropy(
            torch.func.functional_call(
                other, {n: p * masks.get(n, 1) for n, p in other.named_parameters()}, (x,)
            ),
            y,
        ).backward()
        reference.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_momentum_from_before_pruning_is_forgotten() -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    train(model, optimizer)
    held = dimap.hold_masks(model, masks, optimizer)
    assert_held(model.state_dict(), masks)
    assert_state_zero(optimizer, held, model)
    train(model, optimizer)
    assert_state_zero(optimizer, held, model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
def test_nan_inf_and_negative_zero_become_plus_zero(value: float) -> None:
    model, masks = micro()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held = dimap.hold_masks(model, masks, optimizer)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    for name, mask in masks.items():
        p = model.get_parameter(name)
        p.grad[~mask] = value
        with torch.no_grad():
            p[~mask] = value
    optimizer.step()
    assert_held(model.state_dict(), masks)
    assert_state_zero(optimizer, held, model)


def test_gradient_accumulation_and_clipping() -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    held = dimap.hold_masks(model, masks, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        for i in range(4):
            x, y = batch(4 * step + i)
            (F.cross_entropy(model(x), y) / 4).backward()
        dense = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        held.zero_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm < dense
        optimizer.step()
        assert_held(model.state_dict(), masks)


def test_gradients_can_be_zero_as_soon_as_they_are_there() -> None:
    """For a loop that takes their norm before anybody is asked; frozen weights have none."""
    model, masks = micro()
    model.blocks[0].requires_grad_(False)
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    held = dimap.hold_masks(model, masks, optimizer, gradients="early")
    for i in range(2):  # accumulated
        F.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        for name, mask in masks.items():
            grad = model.get_parameter(name).grad
            assert grad is None or (not grad[~mask].any() and grad[mask].any())
    held.remove()
    F.cross_entropy(model(batch(2)[0]), batch(2)[1]).backward()
    name = "blocks.1.1.weight"
    assert model.get_parameter(name).grad[~masks[name]].any()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_autocast_and_gradscaler(fused: bool) -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01, fused=fused, foreach=not fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    held = dimap.hold_masks(model, masks, optimizer)
    for i in range(4):
        x, y = batch(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if i == 2:  # a step that the scaler skips
            model.head.weight.grad.fill_(math.inf)
        before = model.head.weight.detach().clone()
        scaler.step(optimizer)
        assert torch.equal(before, model.head.weight) == (i == 2)
        scaler.update()
        assert_held(model.state_dict(), masks)
    assert_state_zero(optimizer, held, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_types(dtype: torch.dtype) -> None:
    model, masks = micro()
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    dimap.hold_masks(model, masks, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert_held(model.state_dict(), masks)


def test_noncontiguous_weights() -> None:
    model, masks = micro()
    name = "blocks.0.1.weight"
    model.blocks[0][1].weight = nn.Parameter(torch.randn(12, 20).t())
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    assert not model.get_parameter(name).is_contiguous()
    train(model, optimizer)
    assert_held(model.state_dict(), masks)


def test_several_optimizers() -> None:
    model, masks = micro()
    first = torch.optim.SGD(model.blocks[0].parameters(), lr=0.1, momentum=0.9)
    second = ADAMW([*model.blocks[1].parameters(), *model.head.parameters()], lr=0.01)
    dimap.hold_masks(model, masks, [first, second])
    for i in range(3):
        train(model, first, steps=1, start=i)
        second.step()
        assert_held(model.state_dict(), masks)


def test_ema_of_timm() -> None:
    timm_utils = pytest.importorskip("timm.utils")
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    for foreach in (True, False):
        ema = timm_utils.ModelEmaV3(model, decay=0.9, foreach=foreach)
        for i in range(3):
            train(model, optimizer, steps=1, start=i)
            ema.update(model, step=i)
            assert_held(ema.module.state_dict(), masks)


def test_lookahead_of_timm() -> None:
    lookahead = pytest.importorskip("timm.optim.lookahead")
    model, masks = micro()
    optimizer = lookahead.Lookahead(ADAMW(model.parameters(), lr=0.01), k=2)
    dimap.hold_masks(model, masks, optimizer)
    for i in range(5):
        train(model, optimizer, steps=1, start=i)
        assert_held(model.state_dict(), masks)


def test_muon_mixes_rows_and_zeros_hold() -> None:
    model, masks = micro()
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizer = torch.optim.Muon(blocks, lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    assert_held(model.state_dict(), masks)


def test_resume_from_a_checkpoint_gives_the_same_weights(tmp_path) -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer, steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    dimap.save_masks(masks, tmp_path / "m.safetensors")
    train(model, optimizer, steps=3, start=3)

    again = micro(seed=1)[0]
    restored = ADAMW(again.parameters(), lr=0.01)
    saved = torch.load(tmp_path / "c", weights_only=True)
    again.load_state_dict(saved["model"])
    held = dimap.hold_masks(again, dimap.load_masks(tmp_path / "m.safetensors"), restored)
    restored.load_state_dict(saved["optimizer"])
    train(again, restored, steps=3, start=3)
    assert_held(again.state_dict(), masks)
    assert_state_zero(restored, held, again)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_dense_optimizer_state_loaded_later_is_pruned_too() -> None:
    model, masks = micro()
    dense = ADAMW(model.parameters(), lr=0.01)
    train(model, dense)
    weights = copy.deepcopy(model.state_dict())
    optimizer = ADAMW(model.parameters(), lr=0.01)
    held = dimap.hold_masks(model, masks, optimizer)
    model.load_state_dict(weights)
    optimizer.load_state_dict(copy.deepcopy(dense.state_dict()))
    assert_held(model.state_dict(), masks)
    assert_state_zero(optimizer, held, model)


def test_state_dict_and_copies_are_the_dense_models() -> None:
    model, masks = micro()
    names = list(model.state_dict())
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    assert list(model.state_dict()) == names
    assert [type(p) for p in model.parameters()] == [nn.Parameter] * len(names)
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == names
    assert_held(twin.state_dict(), masks)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    # The copy is free until its own optimizer holds it; copied optimizers hold nothing.
    free = ADAMW(twin.parameters(), lr=0.01)
    dimap.hold_masks(twin, masks, free).remove()
    train(twin, free)
    name, mask = next(iter(masks.items()))
    assert twin.get_parameter(name)[~mask].any()
    assert_held(model.state_dict(), masks)


def test_the_end_of_a_with_block_lets_go() -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    with dimap.hold_masks(model, masks, optimizer):
        train(model, optimizer)
        assert_held(model.state_dict(), masks)
    assert_held(model.state_dict(), masks)
    train(model, optimizer)
    for name, mask in masks.items():
        assert model.get_parameter(name)[~mask].any()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


def test_compiled_model_and_compiled_step() -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    dimap.hold_masks(compiled, masks, optimizer)  # names of the plain model

    @torch.compile(backend="aot_eager")
    def step() -> None:
        optimizer.step()

    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        step()
        assert_held(model.state_dict(), masks)


def test_submodules_compiled_in_place() -> None:
    model, masks = micro()
    model.blocks[0] = torch.compile(model.blocks[0], backend="aot_eager")
    optimizer = ADAMW(model.parameters(), lr=0.01)
    held = dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    assert "blocks.0._orig_mod.1.weight" in model.state_dict()
    plain = {n.replace("_orig_mod.", ""): w for n, w in model.state_dict().items()}
    assert_held(plain, masks)
    assert list(held.masks) == list(masks)


def test_export() -> None:
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    model.eval()
    x = batch(0)[0]
    program = torch.export.export(model, (x,))
    assert set(program.state_dict) == set(model.state_dict())
    assert_held(program.state_dict, masks)
    assert torch.equal(program.module()(x), model(x))


def test_onnx_export(tmp_path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, masks = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    torch.onnx.export(
        model.eval(), (batch(0)[0],), tmp_path / "m.onnx", verbose=False, optimize=False
    )
    graph = onnx.load(tmp_path / "m.onnx").graph
    found = {
        t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer
    }
    assert_held(found, masks)


def train_data_parallel() -> dict[str, torch.Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    model, masks = micro()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    held = dimap.hold_masks(ddp, masks, optimizer)
    for i in range(3):
        x, y = batch(2 * i + torch.distributed.get_rank())
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        assert_held(model.state_dict(), masks)
    assert_state_zero(optimizer, held, model)
    return model.state_dict()


def test_ddp_on_two_processes() -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    group = Group(2)
    try:
        first, second = group(train_data_parallel)
    finally:
        group.close()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_masks_of_another_model_change_nothing() -> None:
    model, masks = micro()
    before = copy.deepcopy(model.state_dict())
    optimizer = ADAMW(model.parameters(), lr=0.01)
    name = next(iter(masks))
    with pytest.raises(ValueError, match=r"got none called layers\.0"):
        dimap.hold_masks(model, {**masks, "layers.0": torch.ones(2, dtype=torch.bool)}, optimizer)
    with pytest.raises(
        ValueError, match=rf"mask of {name} must have the weight's shape \(20, 12\)"
    ):
        dimap.hold_masks(model, {**masks, name: torch.ones(2, dtype=torch.bool)}, optimizer)
    with pytest.raises(TypeError, match=f"mask of {name} must be bool, got torch.float32"):
        dimap.hold_masks(model, {**masks, name: masks[name].float()}, optimizer)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        dimap.hold_masks({}, masks, optimizer)
    with pytest.raises(TypeError, match="must be a torch Optimizer, got list"):
        dimap.hold_masks(model, masks, [model])
    other = ADAMW(micro()[0].parameters(), lr=0.01)
    with pytest.raises(ValueError, match=f"got none for {name}: was it made for another copy"):
        dimap.hold_masks(model, masks, other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_hooks_is_refused() -> None:
    model, masks = micro()

    class Bare(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:  # as wrappers do: not super().__init__
            self.param_groups = [{"params": list(params)}]

        def step(self) -> None: ...

    with pytest.raises(TypeError, match="got Bare, whose step runs none"):
        dimap.hold_masks(model, masks, Bare(model.parameters()))


def test_tied_weights_need_one_mask() -> None:
    model, masks = micro()
    model.blocks[1][1].weight = model.blocks[0][1].weight
    optimizer = ADAMW(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="are one parameter and must have one mask"):
        dimap.hold_masks(model, masks, optimizer)
    masks["blocks.1.1.weight"] = masks["blocks.0.1.weight"]
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    assert_held(model.state_dict(), masks)


def test_frozen_weights_are_zeroed_and_no_optimizer_needs_them() -> None:
    model, masks = micro()
    model.blocks[0].requires_grad_(False)
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer)
    assert_held(model.state_dict(), masks)


def test_no_masks() -> None:
    model, _ = micro()
    optimizer = ADAMW(model.parameters(), lr=0.01)
    with dimap.hold_masks(model, {}, optimizer) as held:
        train(model, optimizer)
    assert held.masks == {}
