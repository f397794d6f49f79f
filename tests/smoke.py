"""A short check that needs torch and dimap alone: the wheel beside another torch."""

from __future__ import annotations

import dimap
import torch
from dimap import ops, reference


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weights = [torch.randn(300, 400).to(dtype), torch.randn(1000).to(dtype)]
        args = (weights, [0, 1], [0, 0], [50_000])
        masks, want = ops.select(*args), reference.select(*args)
        assert all(torch.equal(a, b) for a, b in zip(masks, want, strict=True))
        scores, want64 = ops.score(weights, [0, 1]), reference.score64(weights, [0, 1])
        for a, b in zip(scores, want64, strict=True):
            torch.testing.assert_close(a, b.float(), rtol=2e-7, atol=0)
        pruned = [w.clone() for w in weights]
        ops.prune_(pruned, *args[1:])
        assert all(torch.equal(p, w * m) for p, w, m in zip(pruned, weights, masks, strict=True))
    compiled = torch.compile(
        lambda w: torch.ops.dimap.score(w, [0, 1]), fullgraph=True, backend="eager"
    )
    assert all(torch.equal(a, b) for a, b in zip(compiled(weights), scores, strict=True))
    try:
        ops.select([torch.tensor([float("nan")])], [0], [0], [1])
    except RuntimeError as error:
        assert "weights[0] must be finite" in str(error)
    else:
        raise AssertionError("a NaN was accepted")
    print(
        f"smoke test passed: dimap {dimap.__version__}, torch {torch.__version__}, {dimap.build_info()}"
    )


if __name__ == "__main__":
    main()
