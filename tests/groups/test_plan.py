"""Plans: made of names and shapes alone, they say what plans of models say."""

from __future__ import annotations

import pytest
import torch
from dimap.groups import family_of, is_parameter, position
from dimap.groups.plan import Plan

STATE = {
    f"layers.{stage}.blocks.{block}.{name}.weight": torch.randn(4, 4 + stage)
    for stage in range(2)
    for block in range(2)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
}
STATE["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
SHAPES = {n: tuple(t.shape) for n, t in STATE.items() if is_parameter(n, t.is_floating_point())}


@pytest.mark.parametrize("scope", ["module", "global", "layer", "type", "block", "stage"])
@pytest.mark.parametrize("normalize", ["layer", "block", "stage", "module", "scope"])
def test_shapes_give_the_plan_of_the_model(scope: str, normalize: str) -> None:
    of_shapes, of_model = (
        Plan.of_shapes(SHAPES, scope, normalize),
        Plan.of(STATE, scope, normalize),
    )
    assert [t.data_ptr() for t in of_model.tensors] == [STATE[n].data_ptr() for n in of_model.names]
    assert of_model.sizes == [t.numel() for t in of_model.tensors]
    of_model.tensors = []
    assert of_shapes == of_model
    assert sum(of_shapes.keep(0.5)) == sum(of_shapes.sizes) // 2


def test_only_shapes_of_a_known_family_have_one() -> None:
    family = family_of(SHAPES)
    assert family is not None
    assert family.name == "swin"
    assert family_of({"layers.0.blocks.0.attn.qkv.weight": (4, 4)}) is None
    assert family_of({}) is None


def test_a_parameter_floats_or_is_a_weight() -> None:
    assert is_parameter("norm.bias", True)
    assert is_parameter("fc.weight", False)
    assert not is_parameter("norm.num_batches_tracked", False)


def test_what_has_no_position_is_sorted_last_unless_told_otherwise() -> None:
    layers = [x for xs in Plan.of_shapes(SHAPES, "module", "layer").modules.values() for x in xs]
    assert position(layers[0]) == ("", 0, 0)
    bare = type(layers[0])("head", "aux", ("head.weight",))
    assert position(bare) > position(layers[-1]) > position(bare, -1)
