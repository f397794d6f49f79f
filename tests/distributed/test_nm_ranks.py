"""N:M by several ranks: files bit by bit as by one, sharded models as whole ones."""

from __future__ import annotations

import dimap
import pytest
import torch
import torch.distributed as dist
from checkpoints import shards, vit
from dimap.stream import prune_checkpoint
from ranks import Group

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo"
)
CASES = [
    ({"nm": "2:4"}, "dense"),
    ({"nm": "3:8"}, "bitmask"),
    ({"sparsity": 0.5, "nm": "auto"}, "bitmask"),
]


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.large), 3], ids=["2 ranks", "3 ranks"]
)
def group(request):
    group = Group(request.param)
    yield group
    group.close()


def prune_files(source, out, masks, options):
    done = prune_checkpoint(source, out, masks=masks, **options, group=dist.group.WORLD)
    return done.kept, done.nonzero, done.nm


@pytest.mark.parametrize(("options", "form"), CASES)
def test_files(group, tmp_path, options, form) -> None:
    source = shards(tmp_path / "in", vit(step=0.01, blocks=3))
    options = {**options, "format": form}
    want = prune_checkpoint(source, tmp_path / "one", masks=tmp_path / "one.masks", **options)
    found = group(prune_files, source, tmp_path / "out", tmp_path / "out.masks", options)
    assert found == [(want.kept, want.nonzero, want.nm)] * group.size
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert (tmp_path / "one.masks").read_bytes() == (tmp_path / "out.masks").read_bytes()


def prune_sharded(axis, options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = vit(step=0.01, width=48)  # 16 or 24 inputs on a rank
    sharded = {
        name: distribute_tensor(w.clone(), mesh, [Shard(min(axis, w.ndim - 1))])
        for name, w in state.items()
    }
    pruning, got = dimap.prune(state, **options), dimap.prune(sharded, **options)
    assert got.nm == pruning.nm
    for name, mask in pruning.masks.items():
        assert got.masks[name].placements == sharded[name].placements
        assert torch.equal(got.masks[name].full_tensor(), mask), name
    for name, tensor in state.items():
        assert torch.equal(sharded[name].full_tensor(), tensor), name
    return True


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("options", [options for options, _ in CASES], ids=str)
def test_sharded_models(group, axis, options) -> None:
    assert group(prune_sharded, axis, options) == [True] * group.size


def test_groups_that_a_shard_would_cut_are_refused_by_all(group) -> None:
    for name, message in group.outcomes(
        prune_sharded, 1, {"nm": {2: "2:16", 3: "2:12"}[group.size]}
    ):
        assert name in ("ValueError", "RuntimeError")
        assert "must be sharded in whole groups of" in message
    assert group(prune_sharded, 0, {"nm": "2:4"}) == [True] * group.size
