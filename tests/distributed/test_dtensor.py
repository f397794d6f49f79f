"""Sharded models: the masks are those of the whole tensors, and no weight leaves its process."""

from __future__ import annotations

import ctypes

import cuda_emulator
import dimap
import pytest
import torch
import torch.distributed as dist
from checkpoints import DTYPES, vit
from ranks import Group
from torch import nn

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)


@pytest.fixture(
    scope="module",
    params=[pytest.param(2, marks=pytest.mark.large), 3, 4],
    ids=["2 ranks", "3 ranks", "4 ranks"],
)
def group(request):
    group = Group(request.param)
    yield group
    group.close()


# What the ranks run. Imports of torch.distributed.tensor stay in here: it is slow.


def mesh_of(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def distributed(state, place, mesh):
    from torch.distributed.tensor import distribute_tensor

    return {
        name: distribute_tensor(tensor.clone(), mesh, place(i, name))
        if place(i, name)
        else tensor.clone()
        for i, (name, tensor) in enumerate(state.items())
    }


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_masks(got, want, state):
    assert got.keys() == want.keys()
    for name, mask in got.items():
        assert type(mask) is type(state[name]), name
        if hasattr(mask, "placements"):
            assert mask.placements == state[name].placements, name
            assert mask.to_local().shape == state[name].to_local().shape, name
        assert torch.equal(whole(mask), want[name]), name


def compare(state, sharded, **options):
    """select and prune of sharded tensors against those of whole ones."""
    want = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(want, **options)
    if "scope" not in options:
        assert_masks(dimap.select(sharded, **options), pruning.masks, sharded)
    got = dimap.prune(sharded, **options)
    assert_masks(got.masks, pruning.masks, sharded)
    assert repr(got.thresholds) == repr(pruning.thresholds)
    for name, tensor in want.items():
        assert torch.equal(whole(sharded[name]), tensor), name


OPTIONS = [
    {"sparsity": 0.55},
    {"sparsity": 0.3, "scope": "global"},
    {"sparsity": 0.7, "scope": "layer"},
    {"sparsity": 0.9, "normalize": "block"},
    {"sparsity": {"qkv": 0.0, "proj": 1.0, "mlp": 0.5}},
    {"sparsity": 0.5, "min_keep": 0.49, "limits": {"blocks.0.*": (0.5, 1)}},
    {"sparsity": "auto", "params": 0.6, "max_keep": 0.8},
]


def placements(kind):
    from torch.distributed.tensor import Replicate, Shard

    return {
        "rows": lambda i, name: [Shard(0)],
        "columns": lambda i, name: [Shard(min(1, len(vit()[name].shape) - 1))],
        "replicated": lambda i, name: [Replicate()],
        "mixed": lambda i, name: [[Shard(0)], [Replicate()], [Shard(0)], None][i % 4],
    }[kind]


def compare_all(kind, step):
    mesh = mesh_of(dist.get_world_size())
    for dtype in DTYPES.values():
        state = vit(dtype, width=20, step=step)  # 20, 60, 80 and 7 rows: uneven on three ranks
        for options in OPTIONS if dtype == torch.float32 else OPTIONS[:1]:
            compare(state, distributed(state, placements(kind), mesh), **options)


def compare_zeros():
    """Nothing but ties, and more ranks than rows."""
    mesh = mesh_of(dist.get_world_size())
    state = {name: torch.zeros_like(t) for name, t in vit(width=2).items()}
    for kind in ("rows", "columns"):
        compare(state, distributed(state, placements(kind), mesh), sparsity=0.37)


def compare_in_small_chunks():
    from dimap.distributed import _dtensor

    before, _dtensor.CHUNK = _dtensor.CHUNK, 1000
    try:
        compare_all("rows", 0.01)
    finally:
        _dtensor.CHUNK = before


def compare_as_on_gpus(kind, step):
    """By surveys of the operators, as where weights are on GPUs."""
    from dimap.distributed import _dtensor

    before, _dtensor._decide_in_memory = _dtensor._decide_in_memory, _dtensor._decide_on_devices
    try:
        compare_all(kind, step)
        select_bad("nan")
    finally:
        _dtensor._decide_in_memory = before


def compare_emulated(library):
    """By the stages of the CUDA operators, on an emulated device: what they are given is on the CPU."""
    from dimap.distributed import _dtensor

    torch.ops.load_library(library)
    calls, copied = (
        ctypes.c_int.in_dll(ctypes.CDLL(library), f"dimap_emulated_host_{name}")
        for name in ("calls", "bytes")
    )
    mesh = mesh_of(dist.get_world_size())
    state = vit(width=20, step=0.01)
    wanted = [dimap.select(state, **options) for options in OPTIONS]
    before = torch.ops.dimap, _dtensor._decide_in_memory
    torch.ops.dimap, _dtensor._decide_in_memory = (
        torch.ops.dimap_emulated, _dtensor._decide_on_devices,
    )  # fmt: skip
    try:
        for kind in ("rows", "mixed"):
            sharded = distributed(state, placements(kind), mesh)
            for options, want in zip(OPTIONS, wanted, strict=True):
                assert_masks(dimap.select(sharded, **options), want, sharded)
    finally:
        torch.ops.dimap, _dtensor._decide_in_memory = before
    # Of a stage the host learns one word, for which it waits: windows, tables, cuts and masks stay where they are.
    assert calls.value > 0
    assert copied.value == calls.value // 2 * 4


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def model(width=20, step=0.02):
    torch.manual_seed(0)
    net = nn.Module()
    net.blocks = nn.ModuleList(Block(width) for _ in range(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.1 / step).round() * step)
    return net


def compare_fsdp(kind):
    """FSDP2 alone, with replicas, and over tensor parallelism (which it cuts once more)."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    size = dist.get_world_size()
    want, net = model(), model()
    if kind == "fsdp":
        mesh = mesh_of(size)
    elif kind == "replicas":
        mesh = mesh_of(2, size // 2, names=("copies", "data"))
    else:
        mesh = mesh_of(2, size // 2, names=("data", "tensor"))
        plan = {"attn.qkv": ColwiseParallel(), "attn.proj": RowwiseParallel()}
        plan |= {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
        for block in net.blocks:
            parallelize_module(block, mesh["tensor"], plan)
        mesh = mesh["data"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    state = dict(want.named_parameters())
    sharded = dict(net.named_parameters())
    expected = dimap.select(want, 0.55)
    assert_masks(dimap.select(net, 0.55), expected, sharded)
    dimap.prune(net, 0.55)
    dimap.prune(want, 0.55)
    for name, parameter in state.items():
        assert torch.equal(whole(sharded[name]), parameter), name
    return sorted({str(p.placements) for p in sharded.values()})


def bytes_exchanged(width):
    """The largest tensor that a collective of `select` is given, in bytes."""
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.tensor import Shard

    state = vit(width=width, step=0.01)
    sharded = distributed(state, lambda i, name: [Shard(0)], mesh_of(dist.get_world_size()))
    sizes, before = [], (dist.all_reduce, c10d.all_gather)

    def all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return before[0](tensor, *args, **kwargs)

    def all_gather(parts, tensor, *args, **kwargs):
        sizes.append(tensor.nbytes)
        return before[1](parts, tensor, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise AssertionError("a weight is gathered")

    from torch.distributed.tensor import DTensor

    dist.all_reduce, c10d.all_gather = all_reduce, all_gather
    kept, DTensor.redistribute, DTensor.full_tensor = (
        (DTensor.redistribute, DTensor.full_tensor), refuse, refuse,
    )  # fmt: skip
    try:
        dimap.select(sharded, 0.5)
    finally:
        dist.all_reduce, c10d.all_gather = before
        DTensor.redistribute, DTensor.full_tensor = kept
    return max(sizes)


def select_bad(kind):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = mesh_of(dist.get_world_size())
    state = vit(width=20)
    name = "blocks.1.mlp.fc2.weight"
    if kind == "nan":
        state[name][19, 70] = float("nan")  # the last rank's
    sharded = distributed(state, placements("rows"), mesh)
    if kind == "partial":
        sharded[name] = DTensor.from_local(state[name], mesh, [Partial()], run_check=False)
    if kind == "double":
        sharded[name] = sharded[name].double()
    if kind == "other parts":  # not as torch.chunk cuts
        rows = [20] + [0] * (dist.get_world_size() - 1)
        local = state[name].split(rows)[dist.get_rank()]
        sharded[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=(20, 80), stride=(80, 1)
        )
    if kind == "score":
        dimap.score(sharded)
    if kind == "data":
        dimap.select(sharded, 0.5, data=[])
    if kind == "negative":
        saliency = {n: t.abs() for n, t in state.items() if "weight" in n and t.ndim > 1}
        saliency[name][19, 70] = -2
        sharded = distributed(saliency, placements("rows"), mesh)
        dimap.select(sharded, 0.5, saliency=sharded)
    before = {n: t.to_local().clone() for n, t in sharded.items() if n != name}
    try:
        dimap.prune(sharded, 0.5)
    finally:
        assert all(torch.equal(sharded[n].to_local(), t) for n, t in before.items())
        assert Replicate() not in sharded[name].placements


def count_sharded(folder):
    sharded = distributed(vit(), placements("rows"), mesh_of(dist.get_world_size()))
    pruning = dimap.prune(sharded, 0.5)
    for count in (
        lambda: pruning.nonzero,
        pruning.report,
        lambda: pruning.save_masks(folder / "masks.safetensors"),
    ):
        with pytest.raises(ValueError, match="needs whole tensors, got a sharded model's"):
            count()


# The tests


@pytest.mark.parametrize(
    ("kind", "step"),
    [("rows", 0.0), ("rows", 0.01), ("columns", 0.01), ("replicated", 0.01), ("mixed", 0.01)],
    ids=["rows", "rows with ties", "columns with ties", "replicated", "mixed"],
)
def test_masks_of_the_whole(group, kind, step):
    if group.size == 4:
        pytest.skip("two and three ranks tell")
    group(compare_all, kind, step)


def test_nothing_but_ties_on_more_ranks_than_rows(group):
    if group.size == 4:
        pytest.skip("two and three ranks tell")
    group(compare_zeros)


def test_tensors_of_many_chunks(group):
    if group.size == 4:
        pytest.skip("two and three ranks tell")
    group(compare_in_small_chunks)


@pytest.mark.parametrize("kind", ["rows", "mixed"])
def test_tensors_that_are_surveyed_by_operators(group, kind):
    if group.size == 4:
        pytest.skip("two and three ranks tell")
    told_that_a_weight_is_not_finite(group.outcomes(compare_as_on_gpus, kind, 0.01))


@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.large)])
def test_the_stages_of_the_cuda_operators(size):
    library = str(cuda_emulator.build().path)
    group = Group(size)
    try:
        group(compare_emulated, library)
    finally:
        group.close()


def test_fsdp2(group):
    assert group(compare_fsdp, "fsdp")[0] == ["(Shard(dim=0),)"]


def test_fsdp2_with_replicas(group):
    if group.size != 4:
        pytest.skip("needs four ranks")
    assert group(compare_fsdp, "replicas")[0] == ["(Replicate(), Shard(dim=0))"]


def test_fsdp2_over_tensor_parallelism(group):
    """Two meshes: what is not tensor parallel lies on one dimension, the rest on both."""
    if group.size != 4:
        pytest.skip("needs four ranks")
    assert len(group(compare_fsdp, "tensor parallel")[0]) > 2


def test_no_weight_is_gathered(group):
    """Tables are no larger for wide layers than for narrow ones."""
    narrow, wide = group(bytes_exchanged, 64), group(bytes_exchanged, 512)
    assert max(wide) <= max(narrow)
    assert 20 * max(wide) < sum(t.nbytes for t in vit(width=512).values())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("partial", "must be placed by Shard and Replicate only, got (Partial(sum))"),
        ("double", "must be float32, bfloat16 or float16, got float64"),
        ("other parts", "must be sharded in even parts as torch.chunk does"),
    ],
)
def test_what_is_not_handled_is_refused(group, kind, message):
    for name, text in group.outcomes(select_bad, kind):
        assert name in ("ValueError", "RuntimeError")
        assert f"blocks.1.mlp.fc2.weight {message}" in text


def compare_by_saliency(kind, step):
    """A saliency that is placed as the weights are, otherwise, or whole on every rank."""
    mesh = mesh_of(dist.get_world_size())
    state = vit(width=20, step=step)
    sharded = distributed(state, placements(kind), mesh)
    values = {n: (t * 3 - 0.01).abs() for n, t in state.items()}
    for options in ({"sparsity": 0.55}, {"sparsity": 0.4, "normalize": "layer", "scope": "global"}):
        names = dimap.select(state, **options)
        given = {n: values[n] for n in names}
        want = dimap.select(state, saliency=given, **options)
        for other in (None, kind, "columns"):
            placed = distributed(given, placements(other), mesh) if other else given
            assert_masks(dimap.select(sharded, saliency=placed, **options), want, sharded)


@pytest.mark.parametrize("kind", ["rows", "mixed"])
def test_saliencies(group, kind):
    if group.size == 4:
        pytest.skip("two and three ranks tell")
    group(compare_by_saliency, kind, 0.01)


def test_a_negative_saliency_stops_all(group):
    outcomes = group.outcomes(select_bad, "negative")
    assert {name for name, _ in outcomes} <= {"ValueError", "RuntimeError"}
    wanted = "saliency of blocks.1.mlp.fc2.weight must not be negative, got -2 at flat index 1590"
    assert all(wanted in text for _, text in outcomes)


@pytest.mark.parametrize("kind", ["score", "data"])
def test_whole_parameters_are_needed(group, kind):
    for name, text in group.outcomes(select_bad, kind):
        assert name == "ValueError"
        assert text.startswith(f"{kind} needs whole tensors, got a sharded model's (DTensor)")


def test_what_counts_weights_needs_whole_parameters(group, tmp_path):
    """Each rank would count its own."""
    group(count_sharded, tmp_path)


def told_that_a_weight_is_not_finite(outcomes):
    last = len(outcomes) - 1
    message = "blocks.1.mlp.fc2.weight must be finite, got nan at flat index 1590"
    for rank, (name, text) in enumerate(outcomes):
        assert name == ("ValueError" if rank == last else "RuntimeError")
        assert text.startswith(
            message if rank == last else f"rank {last} of {len(outcomes)} stopped: {message}"
        )


def test_a_weight_that_is_not_finite_stops_all(group):
    told_that_a_weight_is_not_finite(group.outcomes(select_bad, "nan"))
