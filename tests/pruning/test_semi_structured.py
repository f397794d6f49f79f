"""Conversion to torch's 2:4: on a GPU the products, anywhere why not."""

from __future__ import annotations

import dimap
import pytest
import torch
from torch import nn

PATTERNS = {"all": r"layers\.(?P<block>\d+)\.weight"}


def model(rows: int = 32, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(columns, rows) for _ in range(3)])
    return nn.ModuleDict({"layers": layers}).to(dtype)


def reasons(m: nn.Module, **options: object) -> dict[str, str]:
    before = {name: p.clone() for name, p in m.named_parameters()}
    done = dimap.to_semi_structured(m, **{"patterns": PATTERNS, **options})
    assert done.converted == []
    assert all(torch.equal(p, before[name]) for name, p in m.named_parameters())
    return done.dense


CPU = "it is on cpu, torch's 2:4 runs on CUDA"


def test_only_the_device_is_in_the_way() -> None:
    m = model()
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    assert reasons(m) == {f"layers.{i}.weight": CPU for i in range(3)}


def test_each_reason() -> None:
    m = model()
    assert reasons(m)["layers.0.weight"] == f"it is not 2:4, but 4:4; {CPU}"
    dimap.prune(m, nm="3:4", patterns=PATTERNS)
    assert reasons(m)["layers.0.weight"] == f"it is not 2:4, but 3:4; {CPU}"
    dimap.prune(m, nm="1:4", patterns=PATTERNS)  # which is 2:4, too
    assert reasons(m)["layers.2.weight"] == CPU
    m = model(dtype=torch.float32)
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    assert (
        reasons(m)["layers.1.weight"] == f"{CPU}; it is float32, torch takes float16 and bfloat16"
    )
    m = model(rows=20, columns=36)
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    assert reasons(m)["layers.0.weight"].startswith(
        f"{CPU}; it is 20 x 36, torch takes multiples of "
    )
    assert reasons(model(columns=66))["layers.0.weight"].startswith(
        "4 does not divide its 66 inputs; "
    )


def test_modules_that_torch_does_not_take() -> None:
    m = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.Conv2d(64, 32, 1).half(), nn.Linear(64, 32).half()])}
    )
    m["layers"].append(m["layers"][1])
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    found = reasons(m)
    assert found["layers.0.weight"].startswith("its module is Conv2d, torch takes nn.Linear alone")
    assert "another module has it, too" in found["layers.1.weight"]


def test_the_report_in_words() -> None:
    m = model()
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    text = str(dimap.to_semi_structured(m, patterns=PATTERNS))
    assert text == f"0 of 3 weights are 2:4 now\n3 dense, layers.0.weight the first: {CPU}"
    assert reasons(m, ignore=r"layers\.1")["layers.2.weight"] == CPU
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got OrderedDict"):
        dimap.to_semi_structured(m.state_dict())


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA device of compute capability 8.0",
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_stay(dtype: torch.dtype) -> None:
    m = model(128, 256, dtype).cuda()
    dimap.prune(m, nm="2:4", patterns=PATTERNS)
    x = torch.randn(64, 256, dtype=dtype, device="cuda")
    want = [layer(x) for layer in m["layers"]]
    done = dimap.to_semi_structured(m, patterns=PATTERNS)
    assert done.converted == [f"layers.{i}.weight" for i in range(3)]
    for layer, y in zip(m["layers"], want, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=2e-2, atol=2e-2)
