"""The callback for the Trainer of Lightning."""

from __future__ import annotations

import copy
import math

import dimap
import pytest
import torch
import torch.nn.functional as F
from ranks import Group
from torch import nn

try:
    import lightning.pytorch as lightning
except ModuleNotFoundError:
    lightning = pytest.importorskip("pytorch_lightning")

from dimap.integrations.lightning import PruningCallback

PATTERNS = {"all": r"net\.(?P<block>\d)\.weight"}
SCHEDULE = dimap.CubicSchedule(0.7, begin=1, end=5, every=2, initial=0.2)


class Module(lightning.LightningModule):
    def __init__(self, manual: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))
        self.automatic_optimization = not manual
        self.norms = []

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def on_before_optimizer_step(self, _):  # callbacks come before
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)
        layers = [self.net[0], nn.ModuleList(self.net[1:])]
        return [torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9) for layer in layers]


def loader():
    rng = torch.Generator().manual_seed(0)
    rows = [
        (torch.randn(8, generator=rng), int(torch.randint(4, (), generator=rng))) for _ in range(32)
    ]
    return torch.utils.data.DataLoader(rows, batch_size=4)


def fit(folder, *callbacks, module=None, ckpt_path=None, steps=6, **options):
    trainer = lightning.Trainer(
        default_root_dir=folder, max_steps=steps, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **{"devices": 1} | options,
    )  # fmt: skip
    module = module or Module()
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def every_step(folder):
    return lightning.callbacks.ModelCheckpoint(
        folder, "{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False
    )


def assert_held(module, masks, sparsity):
    assert masks
    for name, mask in masks.items():
        weight = module.get_parameter(name).detach()
        assert not weight.view(torch.int32)[~mask].any(), name
        assert weight[mask].all(), name
    total = sum(m.numel() for m in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(sparsity * total)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.1}],
    ids=["plain", "bfloat16", "accumulation", "clipping"],
)
def test_zero_from_the_first_step_to_the_last(tmp_path, options):
    callback = PruningCallback(0.6, scope="global", patterns=PATTERNS)
    module = fit(tmp_path, callback, every_step(tmp_path), **options)
    want = dimap.select(Module(), 0.6, scope="global", patterns=PATTERNS)
    assert all(torch.equal(callback.masks[name], mask) for name, mask in want.items())
    assert_held(module, want, 0.6)
    for step in range(1, 7):
        saved = Module()
        saved.load_state_dict(torch.load(tmp_path / f"step={step}.ckpt")["state_dict"])
        assert_held(saved, want, 0.6)


def test_gradients_are_zero_before_they_are_clipped(tmp_path):
    masks = dimap.select(Module(), 0.9, patterns=PATTERNS)
    module = fit(tmp_path, PruningCallback(masks=masks), gradient_clip_val=0.01, steps=1)
    alone = Module()
    optimizer = alone.configure_optimizers()
    holding = dimap.hold_masks(alone, masks, optimizer)
    alone.training_step(next(iter(loader())), 0).backward()
    dense = float(nn.utils.get_total_norm([p.grad for p in alone.parameters()]))
    holding.zero_gradients()
    used = float(nn.utils.clip_grad_norm_(alone.parameters(), 0.01))
    optimizer.step()
    assert module.norms == pytest.approx([used])
    assert used < 0.95 * dense
    for p, q in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("what", [0.6, SCHEDULE], ids=["once", "schedule"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_training_ends_with_the_same_bits(tmp_path, what, stop):
    callbacks = [PruningCallback(what, patterns=PATTERNS) for _ in range(2)]
    options = {
        "accumulate_grad_batches": 2,
        "limit_train_batches": 2,
    }  # loaders begin anew with an epoch
    whole = fit(tmp_path / "whole", callbacks[0], every_step(tmp_path), **options)
    path = tmp_path / f"step={stop}.ckpt"
    again = fit(tmp_path / "again", callbacks[1], ckpt_path=path, **options)
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert_held(again, callbacks[1].masks, 0.6 if what == 0.6 else 0.7)
    for name, mask in callbacks[0].masks.items():
        assert torch.equal(mask, callbacks[1].masks[name])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_counts_steps_of_the_optimizer(tmp_path, accumulate):
    seen = {}

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer, *_):
            masks = callback.masks.values()
            dropped = sum(int((~m).sum()) for m in masks) / max(1, sum(m.numel() for m in masks))
            seen[trainer.global_step] = dropped

    callback = PruningCallback(SCHEDULE, patterns=PATTERNS)
    fit(tmp_path, callback, Look(), accumulate_grad_batches=accumulate)
    for step, sparsity in {1: 0.2, 2: 0.2, 5: 0.7, 6: 0.7}.items():
        assert seen[step] == pytest.approx(sparsity, abs=2e-3)
    assert seen[3] == seen[4] == pytest.approx(SCHEDULE.sparsity(3), abs=2e-3)


def test_a_dense_checkpoint_is_pruned_when_training_goes_on(tmp_path):
    fit(tmp_path, every_step(tmp_path), steps=3)
    callback = PruningCallback(0.5, patterns=PATTERNS)
    module = fit(tmp_path, callback, ckpt_path=tmp_path / "step=3.ckpt")
    assert_held(module, callback.masks, 0.5)


def test_several_optimizers_stepped_by_hand(tmp_path):
    callback = PruningCallback(0.5, patterns=PATTERNS)
    module = fit(tmp_path, callback, module=Module(manual=True))
    assert_held(module, callback.masks, 0.5)


def test_two_trainings_with_one_callback(tmp_path):
    callback = PruningCallback(0.5, patterns=PATTERNS)
    module = fit(tmp_path, callback, steps=2)
    masks = copy.deepcopy(dict(callback.masks))
    fit(tmp_path, callback, module=module, steps=2)
    assert_held(module, masks, 0.5)


def on_two_ranks(folder):
    callback = PruningCallback(0.6, patterns=PATTERNS)
    options = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}
    module = fit(folder, callback, every_step(folder), **options)
    want = dimap.select(Module(), 0.6, patterns=PATTERNS)
    assert all(torch.equal(callback.masks[name], mask) for name, mask in want.items())
    assert_held(module, want, 0.6)
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def test_data_parallel_training(tmp_path):
    group = Group(2)
    first, second = group(on_two_ranks, tmp_path)
    group.close()
    assert all((first[name] == second[name]).all() for name in first)


class Sharded(Module):
    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for module in (self.net[0], self.net[2], self.net[3], self.net):
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def on_before_optimizer_step(self, _):
        pass


def on_two_sharded_ranks(folder, ckpt_path):
    """FSDP2: Lightning's FSDPStrategy wants GPUs, its ModelParallelStrategy does not."""
    strategy = lightning.strategies.ModelParallelStrategy(2, 1)
    callback = PruningCallback(SCHEDULE, patterns=PATTERNS)
    options = {"strategy": strategy, "devices": 2, "ckpt_path": ckpt_path}
    module = fit(folder, callback, every_step(folder), module=Sharded(), **options)
    masks = {name: mask.full_tensor() for name, mask in callback.masks.items()}
    whole = {name: p.full_tensor().detach() for name, p in module.named_parameters()}
    dropped = sum(int((~mask).sum()) for mask in masks.values())
    assert dropped == pytest.approx(0.7 * sum(m.numel() for m in masks.values()), abs=1)
    for name, mask in masks.items():
        assert not whole[name].view(torch.int32)[~mask].any(), name
        assert whole[name][mask].all(), name
    return {name: (p.numpy(), masks.get(name)) for name, p in whole.items()}


def test_sharded_training_and_its_resumption(tmp_path):
    group = Group(2)
    whole = group(on_two_sharded_ranks, tmp_path / "whole", None)
    checkpoint = tmp_path / "whole" / "step=4.ckpt"  # an epoch's end: this loader begins anew
    again = group(on_two_sharded_ranks, tmp_path / "again", checkpoint)
    group.close()
    for other in (whole[1], *again):
        for name, (weight, mask) in whole[0].items():
            assert (weight == other[name][0]).all(), name
            assert mask is None or torch.equal(mask, other[name][1]), name


class Cosine(dimap.Schedule):
    """A schedule of the user's own: from 0 to 0.7 in 4 steps, along half a cosine."""

    def sparsity(self, step):
        return 0.35 * (1 - math.cos(math.pi * min(step / 4, 1)))

    def due(self, step):
        return step in (2, 4)


def test_a_schedule_of_the_users_own(tmp_path):
    for steps, sparsity in ((4, 0.7), (3, 0.35)):
        callback = PruningCallback(Cosine(), scope="global", patterns=PATTERNS)
        module = fit(tmp_path, callback, every_step(tmp_path / str(steps)), steps=steps)
        assert_held(module, callback.masks, sparsity)
    again = PruningCallback(Cosine(), scope="global", patterns=PATTERNS)  # goes on, not anew
    fit(tmp_path, again, ckpt_path=tmp_path / "3" / "step=2.ckpt", steps=3)
    assert all(torch.equal(again.masks[name], mask) for name, mask in callback.masks.items())
