"""The operators as torch sees them: opcheck, fake tensors, compile, gradients."""

from __future__ import annotations

import dimap
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.dimap
ARGS = ([torch.randn(7, 5), torch.randn(11).bfloat16()], [0, 1], [0, 0], [20])
WINDOWS = dimap.ops.first_windows([torch.float32, torch.bfloat16], 256)


def decided():
    windows = WINDOWS
    while True:
        table = OPS.survey(*ARGS[:2], windows, 256)
        cuts, quota, _, closer = OPS.solve(table, windows, [0, 0], ARGS[3])
        if int(quota.min()) >= 0:
            return (table, windows), cuts, quota
        windows = closer


OUT = {
    "score": (ARGS[:2], torch.float32),
    "select": (ARGS, torch.bool),
}
CALLS = {
    "score": ARGS[:2],
    "select": ARGS,
    "select_cuts": ARGS,
    "prune_": ([w.clone() for w in ARGS[0]], *ARGS[1:]),
    "apply_": ([w.clone() for w in ARGS[0]], [torch.rand(w.shape) < 0.5 for w in ARGS[0]]),
    "select_nm": ([torch.randn(7, 8), torch.randn(4).bfloat16()], 2, 4, -1),
    "nm_": ([torch.randn(7, 8), torch.randn(4).bfloat16()], 2, 4, -1),
    "survey": (*ARGS[:2], WINDOWS, 256),
    "solve": (*decided()[0], [0, 0], ARGS[3]),
    "emit": (*ARGS[:3], decided()[1], decided()[2]),
    "pack": (torch.tensor([[0.0, -0.0, 1.0], [0.0, 0.0, 2.0]]),),
    "unpack": (torch.tensor([38], dtype=torch.uint8), torch.tensor([-0.0, 1.0, 2.0]), [2, 3]),
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, CALLS[name])


@pytest.mark.parametrize("name", OUT)
def test_opcheck_of_outputs_at_hand(name: str) -> None:
    args, dtype = OUT[name]
    out = [torch.empty(w.shape, dtype=dtype) for w in args[0]]
    torch.library.opcheck(getattr(OPS, name).out, args, {"out": out})


@pytest.mark.parametrize("name", OUT)
def test_compile_of_outputs_at_hand(name: str) -> None:
    args, dtype = OUT[name]

    def run(*args):
        out = [torch.zeros(w.shape, dtype=dtype) for w in args[0]]
        getattr(OPS, name).out(*args, out=out)
        return out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
    for a, b in zip(getattr(OPS, name)(*args), compiled, strict=True):
        assert torch.equal(a, b)


def test_every_operator_is_checked() -> None:
    prefix = "dimap::"
    registered = {
        s.name.removeprefix(prefix)
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith(prefix)
    }
    assert registered == set(CALLS)


def test_compile_fullgraph_gives_the_same() -> None:
    def both(weights, layers, modules, keep):
        return OPS.score(weights, layers), OPS.select(weights, layers, modules, keep)

    eager, compiled = both(*ARGS), torch.compile(both, fullgraph=True, backend="aot_eager")(*ARGS)
    for a, b in zip(eager, compiled, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_compile_fullgraph_of_groups() -> None:
    def both(weights):
        masks = OPS.select_nm(weights, 2, 4, 0)
        OPS.nm_(weights, 2, 4, 0)
        return [w * 2 for w in weights], masks

    w = torch.randn(8, 5)
    a, b = [w.clone()], [w.clone()]
    eager = both(a)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(b)
    for x, y in zip([*a, *eager[0], *eager[1]], [*b, *compiled[0], *compiled[1]], strict=True):
        assert torch.equal(x, y)
    with pytest.raises(RuntimeError, match="multiple of m"), FakeTensorMode() as mode:
        OPS.select_nm([mode.from_tensor(w)], 2, 4, 1)


def test_compile_fullgraph_of_the_in_place_operator() -> None:
    def pruned(weights, layers, modules, keep):
        OPS.prune_(weights, layers, modules, keep)
        return [w * 2 for w in weights]

    a, b = [w.clone() for w in ARGS[0]], [w.clone() for w in ARGS[0]]
    eager = pruned(a, *ARGS[1:])
    compiled = torch.compile(pruned, fullgraph=True, backend="aot_eager")(b, *ARGS[1:])
    for x, y in zip([*a, *eager], [*b, *compiled], strict=True):
        assert torch.equal(x, y)


def test_fake_tensors_have_the_right_shapes() -> None:
    with FakeTensorMode() as mode:
        weights = [mode.from_tensor(w) for w in ARGS[0]]
        scores = OPS.score(weights, [0, 1])
        masks = OPS.select(weights, *ARGS[1:])
    assert [s.shape for s in scores] == [w.shape for w in ARGS[0]]
    assert {s.dtype for s in scores} == {torch.float32}
    assert {m.dtype for m in masks} == {torch.bool}


def test_score_refuses_a_gradient() -> None:
    w = torch.randn(5, requires_grad=True)
    (scores,) = OPS.score([w], [0])
    with pytest.raises(NotImplementedError, match="not differentiable"):
        scores.sum().backward()
    (detached,) = dimap.ops.score([w], [0])
    assert not detached.requires_grad
