"""Gradual pruning."""

from __future__ import annotations

import math

import dimap
import pytest
import torch
from dimap.schedule import CubicSchedule, GradualPruning
from torch import nn

PATTERNS = {"all": r"(?P<block>\d)\.weight"}


def test_cubic_schedule_is_zhu_and_guptas() -> None:
    schedule = CubicSchedule(0.8, begin=10, end=50, every=10, initial=0.2)
    assert [schedule.sparsity(t) for t in (0, 10)] == pytest.approx([0.2, 0.2])
    assert schedule.sparsity(30) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert [schedule.sparsity(t) for t in (50, 90)] == [0.8, 0.8]
    assert [t for t in range(100) if schedule.due(t)] == [10, 20, 30, 40, 50]


def test_the_end_is_due_where_every_does_not_divide() -> None:
    schedule = CubicSchedule(0.5, begin=0, end=7, every=3)
    assert [t for t in range(20) if schedule.due(t)] == [0, 3, 6, 7]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"final": 1.5}, r"final must be in \[0, 1\], got 1.5"),
    ({"final": float("nan")}, r"final must be in \[0, 1\], got nan"),
    ({"initial": 0.9}, r"initial must be in \[0, final = 0.5\], got 0.9"),
    ({"begin": -1}, "begin must be at least 0, got -1"),
    ({"end": 2}, "end must be greater than begin = 2, got 2"),
    ({"every": 0}, "every must be at least 1, got 0"),
])  # fmt: skip
def test_bad_schedules(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        CubicSchedule(**({"final": 0.5, "begin": 2, "end": 9} | arguments))


@pytest.mark.parametrize("method", ["dimap", "taylor"])
def test_sparsity_follows_the_schedule_and_masks_are_nested(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = CubicSchedule(0.75, begin=2, end=10, every=2)
    options = {"data": [(x, y)]} if method == "taylor" else {}
    gradual = GradualPruning(
        model, optimizer, schedule, method=method, scope="global", patterns=PATTERNS, **options
    )
    assert not gradual.masks
    before: dict[str, torch.Tensor] = {}
    pruned = []
    for step in range(1, 15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if gradual.step():
            pruned.append(step)
        for name, mask in gradual.masks.items():
            assert not model.get_parameter(name)[~mask].any()
            assert not (mask & ~before.get(name, mask)).any()  # what was pruned stays pruned
        before = {n: m.clone() for n, m in gradual.masks.items()}
        total = sum(m.numel() for m in before.values())
        kept = sum(int(m.sum()) for m in before.values())
        at = max((t for t in pruned if t <= step), default=None)
        assert kept == (0 if at is None else total - round(schedule.sparsity(at) * total))
    assert pruned == [2, 4, 6, 8, 10]
    gradual.remove()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert any(bool(model.get_parameter(n)[~m].any()) for n, m in before.items())


def test_going_on_from_a_checkpoint_gives_the_same_weights() -> None:
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    schedule = CubicSchedule(0.75, begin=2, end=10, every=3)

    def parts() -> tuple[nn.Module, torch.optim.Optimizer, GradualPruning]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, GradualPruning(model, optimizer, schedule, patterns=PATTERNS)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, gradual: GradualPruning, n: int):
        for _ in range(n):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            gradual.step()

    whole = parts()
    train(*whole, 14)
    for n in (1, 7):  # before the first pruning, and between two
        first = parts()
        train(*first, n)
        second = parts()
        for part, other in zip(second, first, strict=True):
            part.load_state_dict(other.state_dict())
        train(*second, 14 - n)
        for (name, p), q in zip(second[0].named_parameters(), whole[0].parameters(), strict=True):
            assert torch.equal(p, q), (n, name)


def two_layers() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def test_a_number_prunes_once_and_none_never() -> None:
    model, optimizer = two_layers()
    want = dimap.select(model, 0.5, patterns=PATTERNS)
    once = GradualPruning(model, optimizer, 0.5, patterns=PATTERNS)
    assert once.sparsity == 0.5
    assert not any(once.step() for _ in range(5))
    assert all(torch.equal(once.masks[name], mask) for name, mask in want.items())
    never = GradualPruning(model, optimizer, None, patterns=PATTERNS)
    assert not any(never.step() for _ in range(5))
    assert not never.masks


def test_masks_from_the_start_stay_dropped() -> None:
    model, optimizer = two_layers()
    first = dimap.select(model, 0.4, patterns=PATTERNS, scope="layer")
    schedule = CubicSchedule(0.8, begin=0, end=2, initial=0.2)  # begins below what is dropped
    gradual = GradualPruning(model, optimizer, schedule, masks=first, patterns=PATTERNS)
    assert all(torch.equal(gradual.masks[name], mask) for name, mask in first.items())
    gradual.step()
    gradual.step()
    total = sum(mask.numel() for mask in first.values())
    assert sum(int(m.sum()) for m in gradual.masks.values()) == total - round(0.8 * total)
    assert not any((gradual.masks[name] & ~mask).any() for name, mask in first.items())


def test_steps_that_are_done_already_prune_nothing() -> None:
    model, optimizer = two_layers()
    masks = dimap.select(model, 0.3, patterns=PATTERNS)
    schedule = CubicSchedule(0.8, begin=0, end=4, every=2)
    gradual = GradualPruning(model, optimizer, schedule, masks=masks, steps=2, patterns=PATTERNS)
    assert all(torch.equal(gradual.masks[name], mask) for name, mask in masks.items())
    assert [gradual.step() for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("method", ["wanda", "uniform"])
def test_rows_are_pruned_gradually(method: str) -> None:
    model, optimizer = two_layers()
    data = [(torch.randn(32, 8), None)]
    schedule = CubicSchedule(0.75, begin=0, end=4, every=2, initial=0.25)
    options = {"method": method, "scope": "row", "patterns": PATTERNS}
    options |= {"data": data} if method == "wanda" else {}
    gradual = GradualPruning(model, optimizer, schedule, **options)
    before = dict(gradual.masks)
    for _ in range(4):
        gradual.step()
    for name, mask in gradual.masks.items():
        assert (mask.sum(1) == mask.shape[1] // 4).all()
        assert not (mask & ~before[name]).any()


def pruned_gradually(begin: int, **options) -> GradualPruning:
    """To 0.8, where nothing is left of the last layer but for limits."""
    model, optimizer = two_layers()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    schedule = CubicSchedule(0.8, begin=begin, end=begin + 6, every=2, initial=0.6)
    options = {"method": "global_magnitude", "patterns": PATTERNS} | options
    gradual = GradualPruning(model, optimizer, schedule, **options)
    before: dict[str, torch.Tensor] = {}
    for _ in range(begin + 6):
        gradual.step()
        assert not any((m & ~before.get(name, m)).any() for name, m in gradual.masks.items())
        before = {name: m.clone() for name, m in gradual.masks.items()}
    assert gradual.sparsity == 0.8
    return gradual


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize(("options", "least"), [
    ({}, 0),
    ({"min_keep": 0.1}, 7),
    ({"limits": {"1": ("50%", 1.0)}}, 32),
    ({"limits": {"0": (0, "20%")}}, 13),
    ({"min_keep": 0.1, "saliency": True}, 7),
])  # fmt: skip
def test_limits_hold_at_every_pruning(begin: int, options, least: int) -> None:
    if "saliency" in options:
        model, _ = two_layers()
        given = {f"{i}.weight": model[i].weight.detach().abs() * (1, 1e-3)[i] for i in range(2)}
        options = options | {"saliency": given}
    gradual = pruned_gradually(begin, **options)
    kept = [int(gradual.masks[f"{i}.weight"].sum()) for i in range(2)]
    assert kept == [192 - round(0.8 * 192) - least, least]


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("method", ["uniform", "global_magnitude", "taylor"])
def test_groups_stay_groups_at_every_pruning(begin: int, method: str) -> None:
    data = [(torch.randn(32, 8), torch.randint(4, (32,)))]
    options = {"data": data} if method == "taylor" else {}
    gradual = pruned_gradually(begin, nm="auto:8", method=method, **options)
    for i in range(2):
        kept = gradual.masks[f"{i}.weight"].unflatten(1, (-1, 8)).sum(2).unique()
        assert len(kept) == 1, kept  # the same N in all groups of a layer
    total = sum(int(m.sum()) for m in gradual.masks.values())
    assert abs(total - (192 - round(0.8 * 192))) <= 16


@pytest.mark.parametrize(("options", "message"), [
    ({"nm": "2:4"}, r"nm must be auto or auto:M.* got '2:4': give masks=dimap.select"),
    ({"nm": "two"}, "nm .* must be N:M"),
    ({"params": 0.5}, "params must be left out, where a schedule says"),
    ({"flops": "60%", "size": 9}, "flops and size must be left out"),
    ({"min_keep": 0.1, "scope": "row"}, "scope='row' must be given without .* min_keep"),
    ({"min_keep": 0.1, "nm": "auto"}, "nm must be given without .* min_keep"),
    ({"limits": {"1": 0.5}}, "limits.* must be"),
    ({"method": "best"}, "method must be one of"),
    ({"keep": 0.1}, "unexpected keyword argument 'keep'"),
])  # fmt: skip
def test_options_that_no_schedule_can_have(options, message) -> None:
    model, optimizer = two_layers()
    schedule = CubicSchedule(0.8, begin=5, end=9)
    masks = dimap.select(model, 0.1, patterns=PATTERNS)
    for given in ({}, {"masks": masks}):
        with pytest.raises((ValueError, TypeError), match=message):
            GradualPruning(model, optimizer, schedule, patterns=PATTERNS, **given, **options)


def test_one_pruning_meets_a_budget() -> None:
    model, optimizer = two_layers()
    masks = dimap.select(model, 0.1, patterns=PATTERNS)
    for given in ({}, {"masks": masks}):
        once = GradualPruning(model, optimizer, "auto", params=0.5, patterns=PATTERNS, **given)
        left = sum(int(mask.sum()) for mask in once.masks.values()) + 20  # biases
        assert 100 < left <= 106
    with pytest.raises(ValueError, match="params must be left out"):
        GradualPruning(model, optimizer, None, params=0.5, masks=masks, patterns=PATTERNS)


class Cosine(dimap.Schedule):
    """A schedule of the user's own: from 0 to 0.7 in 6 steps, along half a cosine."""

    def sparsity(self, step):
        return 0.35 * (1 - math.cos(math.pi * min(step / 6, 1)))

    def due(self, step):
        return step in (3, 6)


def test_a_schedule_of_the_users_own() -> None:
    model, optimizer = two_layers()
    gradual = GradualPruning(model, optimizer, Cosine(), scope="global", patterns=PATTERNS)
    dropped = []
    for _ in range(8):
        gradual.step()
        dropped.append(sum(int((~m).sum()) for m in gradual.masks.values()))
    assert dropped == [0, 0, *[round(0.35 * 192)] * 3, *[round(0.7 * 192)] * 3]
    with pytest.raises(ValueError, match="params must be left out"):
        GradualPruning(model, optimizer, Cosine(), params=0.5, patterns=PATTERNS)
