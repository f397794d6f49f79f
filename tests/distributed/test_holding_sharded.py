"""Masks hold on sharded models: FSDP2, tensor parallelism, FullyShardedDataParallel."""

from __future__ import annotations

import dimap
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import Group
from torch import nn

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.large), 4], ids=["2 ranks", "4 ranks"]
)
def group(request):
    group = Group(request.param)
    yield group
    group.close()


# What the ranks run. Imports of torch.distributed.tensor stay in here: it is slow.

WIDTH = 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn.proj(F.gelu(self.attn.qkv(self.norm1(x))))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mesh_of(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def in_tensor_parallel(model, mesh):
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel()}
    plan |= {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def sharded(kind, model):
    """The model, sharded in place, by the name of the way."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size, options = dist.get_world_size(), {}
    if kind == "tensor parallel":
        in_tensor_parallel(model, mesh_of(size))
        return model
    if kind == "both":
        mesh = mesh_of(2, size // 2, names=("data", "tensor"))
        in_tensor_parallel(model, mesh["tensor"])
        mesh = mesh["data"]
    else:
        mesh = (
            mesh_of(2, size // 2, names=("copies", "data")) if kind == "copies" else mesh_of(size)
        )
    if kind == "bfloat16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "fused adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, foreach=False),
}


def train(model, optimizer, steps, start=0, holding=None):
    """The same batches on every rank: the mean of their gradients is exactly that of one process."""
    for i in range(start, start + steps):
        rng = torch.Generator().manual_seed(i)
        dtype = next(model.parameters()).dtype
        x, y = (
            torch.randn(8, WIDTH, generator=rng, dtype=dtype),
            torch.randint(3, (8,), generator=rng),
        )
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if holding is not None:
            holding.zero_gradients()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert whole(norm) > 0.1
        optimizer.step()


def alone(masks, make, steps=3, clip=False, dtype=torch.float32):
    """The weights after training in one process."""
    model = net(dtype)
    optimizer = make(model.parameters())
    holding = dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer, steps, holding=holding if clip else None)
    return dict(model.named_parameters())


def assert_held(model, masks):
    for name, weight in model.named_parameters():
        if name in masks:
            bits = whole(weight.detach()).float().view(torch.int32)
            assert not bits[~masks[name]].any(), name
            assert bits[masks[name]].all(), name


def assert_state_zero(model, optimizer, masks):
    seen = 0
    for name, weight in model.named_parameters():
        for value in optimizer.state[weight].values() if name in masks else ():
            if value.shape == weight.shape:
                assert not whole(value)[~masks[name]].any(), name
                assert whole(value)[masks[name]].any(), name
                seen += 1
    assert seen


def hold(kind, optimizer, given, clip=False, dtype=torch.float32):
    """Train a sharded model with masks held, and compare with one that is not sharded."""
    make = OPTIMIZERS[optimizer]
    exact = kind in ("fsdp", "copies") and not clip and optimizer != "fused adamw"  # each sum, too
    masks = dimap.select(net(), 0.6)
    model = sharded(kind, net(dtype))
    ours = {"whole": masks, "placed": None, "prefixed": {f"model.{n}": m for n, m in masks.items()}}
    ours = ours[given] or dimap.select(model, 0.6)
    optimizer = make(model.parameters())
    holding = dimap.hold_masks(model, ours, optimizer)
    assert_held(model, masks)
    for name, mask in holding.masks.items():
        assert mask.placements == model.get_parameter(name).placements
        assert torch.equal(whole(mask), masks[name])
    train(model, optimizer, 3, holding=holding if clip else None)
    assert_held(model, masks)
    assert_state_zero(model, optimizer, masks)
    want = alone(masks, make, clip=clip, dtype=dtype)
    for name, weight in model.named_parameters():
        got = whole(weight.detach())
        if exact:
            assert torch.equal(got, want[name]), name
        elif kind != "bfloat16":
            torch.testing.assert_close(got, want[name], rtol=1e-3, atol=1e-4)
    holding.remove()
    train(model, optimizer, 1, start=3)
    assert any(whole(model.get_parameter(n).detach())[~m].any() for n, m in masks.items())


def save(kind, folder):
    """Three steps, a checkpoint, three more: the weights then."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model = sharded(kind, net())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    holding = dimap.hold_masks(model, dimap.select(model, 0.6), optimizer)
    train(model, optimizer, 3)
    weights, state = get_state_dict(model, optimizer)
    dcp.save(
        {"model": weights, "optimizer": state, "masks": dict(holding.masks)}, checkpoint_id=folder
    )
    train(model, optimizer, 3, start=3)
    return {name: whole(weight.detach()).numpy() for name, weight in model.named_parameters()}


def resume(kind, folder):
    """A model of other weights goes on from the checkpoint, whatever sharded what is in there."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = net()
    with torch.no_grad():
        for weight in model.parameters():
            weight.neg_()
    model = sharded(kind, model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks = {n: w.detach() != 0 for n, w in model.named_parameters() if n in dimap.select(net(), 0)}
    dcp.load({"masks": masks}, checkpoint_id=folder)
    weights, state = get_state_dict(model, optimizer)
    dcp.load(saved := {"model": weights, "optimizer": state}, checkpoint_id=folder)
    dimap.hold_masks(model, masks, optimizer)
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    want = dimap.select(net(), 0.6)
    assert_held(model, want)
    train(model, optimizer, 3, start=3)
    assert_held(model, want)
    assert_state_zero(model, optimizer, want)
    return {name: whole(weight.detach()).numpy() for name, weight in model.named_parameters()}


def flat(original, strategy):
    """FullyShardedDataParallel, with the same weights in the end as one process."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp import ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    masks = dimap.select(net(), 0.6)
    model = Fsdp(
        net(), auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=original,
        sharding_strategy=ShardingStrategy[strategy], device_id=torch.device("cpu"),
    )  # fmt: skip
    make = OPTIMIZERS["adamw"]
    optimizer = make(model.parameters())
    for bad in (
        {"head.weight": masks["blocks.0.attn.qkv.weight"]},
        {"nothing.of.it": torch.ones(1) > 0},
    ):
        with pytest.raises(ValueError, match="must have"):
            dimap.hold_masks(model, bad, optimizer)
    with Fsdp.summon_full_params(model):
        for (_, got), want in zip(model.named_parameters(), net().parameters(), strict=True):
            assert torch.equal(got, want)  # nothing was changed
    holding = dimap.hold_masks(model, masks, optimizer)
    train(model, optimizer, 3)
    named = dict(model.named_parameters())
    for name, mask in holding.masks.items():
        [weight] = [p for n, p in named.items() if n.replace("_fsdp_wrapped_module.", "") == name]
        for value in filter(lambda v: v.ndim, optimizer.state[weight].values()):
            assert value.shape == mask.shape, name
            assert not value[~mask].any(), name
    with Fsdp.summon_full_params(model):
        got = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in model.named_parameters()}
        for name, want in alone(masks, make).items():
            assert torch.equal(got[name], want), name
            if name in masks:
                assert not got[name].detach().view(torch.int32)[~masks[name]].any()
    held = holding.masks
    holding.remove()
    optimizer.zero_grad()
    return sorted(held), sum(int((~mask).sum()) for mask in held.values())


def gradually(kind):
    """The masks of gradual pruning are those of one process, whatever the model lies on."""
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def run(model):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        schedule = dimap.CubicSchedule(0.8, begin=0, end=4, every=2, initial=0.3)
        gradual = dimap.GradualPruning(model, optimizer, schedule)
        found = [dict(gradual.masks)]
        for i in range(4):
            train(model, optimizer, 1, start=i)
            if gradual.step():
                found.append(dict(gradual.masks))
        return found

    if kind == "flat":
        policy = ModuleWrapPolicy({Block})
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        model = Fsdp(net(), auto_wrap_policy=policy, **options)
    else:
        model = sharded(kind, net())
    got, want = run(model), run(net())
    assert len(got) == 3
    for ours, theirs in zip(got, want, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(whole(ours[name]), theirs[name]) for name in ours)


def operators(sizes, seed):
    """The raw operators on DTensors of any placements, beside plain tensors, are those on the whole."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(2, dist.get_world_size() // 2) if dist.get_world_size() == 4 else mesh_of(2)
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (), generator=rng))  # noqa: E731
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = [(torch.randn(size, generator=rng) * 8).round().to(dtype) for size in sizes]
        masks = [torch.rand(size, generator=rng) < 0.5 for size in sizes]
        spread = lambda t: distribute_tensor(  # noqa: E731
            t.clone(), mesh, [[Shard(draw(t.ndim)), Replicate()][draw(2)] for _ in range(mesh.ndim)]
        )
        got = [spread(w) for w in weights]
        # Masks as they come: placed otherwise, or the whole on every rank.
        torch.ops.dimap.apply_(got, [spread(m) if draw(3) else m for m in masks])
        want = [w.clone() for w in weights]
        torch.ops.dimap.apply_(want, masks)
        assert all(torch.equal(whole(g), w) for g, w in zip(got, want, strict=True))
        plain = weights[0].clone()
        torch.ops.dimap.apply_([plain, *got[1:]], [spread(masks[0]), *masks[1:]])
        assert torch.equal(plain, want[0])

        count = len(sizes)
        numbers = list(range(count)), [0] * count, [sum(w.numel() for w in weights) // 3]
        got, want = [spread(w) for w in weights], [w.clone() for w in weights]
        before = got[0]._version
        dimap.ops.prune_(got, *numbers)
        dimap.ops.prune_(want, *numbers)
        assert all(torch.equal(whole(g), w) for g, w in zip(got, want, strict=True))
        assert got[0]._version > before  # autograd knows

    weight = torch.randn(6, 8, generator=rng)
    got, want = [distribute_tensor(weight.clone(), mesh, [Shard(0)] * mesh.ndim)], [weight]
    dimap.ops.nm_(got, 2, 4)
    dimap.ops.nm_(want, 2, 4)
    assert torch.equal(whole(got[0]), want[0])


def zero_what_is_partial(dtype):
    """A gradient whose parts are not added up yet, and one that is placed otherwise than its weight."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = mesh_of(dist.get_world_size())
    torch.manual_seed(3)
    weight, mask = torch.randn(5, 7, dtype=dtype), torch.rand(5, 7) < 0.5
    for placement in (Replicate(), Shard(0), Shard(1)):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
        holding = dimap.hold_masks(
            model, {"weight": mask}, torch.optim.SGD(model.parameters(), 0.1)
        )
        if placement == Replicate():
            part = torch.full((5, 7), dist.get_rank() + 1.0, dtype=dtype)
            model.weight.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        else:
            model.weight.grad = distribute_tensor(weight, mesh, [placement])
        holding.zero_gradients()
        assert torch.equal(whole(model.weight.grad) != 0, mask)
        assert torch.equal(whole(model.weight.detach()) != 0, mask)
    state = {"weight": distribute_tensor(weight, mesh, [Shard(1)])}
    dimap.apply_masks(state, {"weight": mask})
    assert torch.equal(whole(state["weight"]), weight * mask)


HUGGING_FACE = {
    "attn.qkv.weight": [f"attention.attention.{x}" for x in ("query", "key", "value")],
    "attn.proj.weight": ["attention.output.dense"],
    "mlp.fc1.weight": ["intermediate.dense"],
    "mlp.fc2.weight": ["output.dense"],
}


def hold_fused_as_split():
    """Masks of q, k and v fit a model that has them in one, sharded or not."""
    masks = dimap.select(net(), 0.6)
    model = sharded("fsdp", net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for given in (masks, dimap.select(model, 0.6)):
        split = {}
        for name, mask in given.items():
            _, block, part = name.split(".", 2)
            theirs = [f"vit.encoder.layer.{block}.{x}.weight" for x in HUGGING_FACE[part]]
            split |= zip(theirs, mask.split(len(mask) // len(theirs)), strict=True)
        try:
            with dimap.hold_masks(model, split, optimizer):
                assert_held(model, masks)
        finally:
            optimizer.zero_grad()


def hold_bad(kind):
    from torch.distributed.tensor import DTensor, Shard

    model = sharded("fsdp", net())
    before = {n: p.to_local().clone() for n, p in model.named_parameters()}
    name = "blocks.1.mlp.fc2.weight"
    masks = {name: torch.ones(WIDTH, 4 * WIDTH, dtype=torch.bool)}
    if kind == "shape":
        masks[name] = masks[name].t()
    else:  # not as torch.chunk cuts
        weight = model.get_parameter(name)
        rows = [WIDTH] + [0] * (dist.get_world_size() - 1)
        local = torch.ones(WIDTH, 4 * WIDTH).split(rows)[dist.get_rank()].contiguous()
        model.blocks[1].mlp.fc2.weight = nn.Parameter(
            DTensor.from_local(
                local, weight.device_mesh, [Shard(0)], run_check=False,
                shape=weight.shape, stride=weight.stride(),
            )
        )  # fmt: skip
        del before[name]
    try:
        dimap.hold_masks(model, masks, torch.optim.SGD(model.parameters(), 0.1))
    finally:
        now = dict(model.named_parameters())
        assert all(torch.equal(now[n].to_local(), t) for n, t in before.items())


# The tests


@pytest.mark.parametrize(
    ("kind", "optimizer", "given"),
    [
        ("fsdp", "adamw", "placed"),
        ("fsdp", "fused adamw", "whole"),
        ("fsdp", "sgd", "prefixed"),
        ("copies", "adamw", "whole"),
        ("bfloat16", "adamw", "placed"),
        ("tensor parallel", "adamw", "whole"),
        ("both", "adamw", "placed"),
        ("both", "sgd", "whole"),
    ],
)
def test_training_of_a_sharded_model(group, kind, optimizer, given):
    if kind == "both" and group.size == 2:
        pytest.skip("needs four ranks")
    group(hold, kind, optimizer, given)


def test_clipping_and_float64(group):
    group(hold, "fsdp", "adamw", "placed", True)
    group(hold, "fsdp", "adamw", "whole", False, torch.float64)


@pytest.mark.parametrize("kind", ["fsdp", "both"])
def test_checkpoint_and_resume(group, kind, tmp_path):
    if kind == "both" and group.size == 2:
        pytest.skip("needs four ranks")
    want, got = group(save, kind, tmp_path)[0], group(resume, kind, tmp_path)[0]
    for name, weight in want.items():
        assert (weight == got[name]).all(), name


def test_a_checkpoint_of_four_ranks_goes_on_with_two(tmp_path):
    results = []
    for size, function in ((4, save), (2, resume)):
        group = Group(size)
        results.append(group(function, "fsdp", tmp_path)[0])
        group.close()
    for name, weight in results[0].items():
        assert (weight == results[1][name]).all(), name


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_fully_sharded_data_parallel(group, original, strategy):
    told = group(flat, original, strategy)
    dropped = sum(int((~m).sum()) for m in dimap.select(net(), 0.6).values())
    ranks = group.size if strategy == "NO_SHARD" else 1
    assert sum(count for _, count in told) == ranks * dropped
    if original:
        assert told[0][0] == sorted(dimap.select(net(), 0))


@pytest.mark.parametrize("kind", ["fsdp", "copies", "flat"])
def test_gradual_pruning_of_a_sharded_model(group, kind):
    group(gradually, kind)


@pytest.mark.parametrize("sizes", [[(6, 4), (9,), (3, 5)], [(1, 1), (2, 3, 4)]], ids=str)
def test_the_operators_take_dtensors(group, sizes):
    for seed in range(3):
        group(operators, sizes, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_that_are_placed_otherwise(group, dtype):
    group(zero_what_is_partial, dtype)


def test_masks_of_split_projections(group):
    group(hold_fused_as_split)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", "must have the weight's shape (12, 48), got (48, 12)"),
        ("other parts", "must be in even parts as torch.chunk makes them"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(group, kind, message):
    for rank, (name, text) in enumerate(group.outcomes(hold_bad, kind)):
        assert name == "ValueError", rank
        assert message in text, rank
