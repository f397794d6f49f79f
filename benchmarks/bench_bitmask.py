"""Bitmask files: packing and unpacking in dense bytes a second, and their size.

    python benchmarks/bench_bitmask.py [--save]

Swin-B, pruned at 55 %: in memory, `dimap.ops.pack` and `unpack` of all prunable weights beside
`Tensor.clone` of the same; on disk, `dimap prune` to dense and to bitmask files, and `dimap expand`,
of the whole model as a safetensors file. Sizes are of these files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import dimap
import torch
from dimap import ops, stream
from dimap.bitmask import expand
from harness import machine, save, time_in_turns
from safetensors.torch import save_file
from shapes import problem

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/bitmask.json")
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where there is 1.5 GB of room"
    )
    options = parser.parse_args()
    place = options.folder / "bench-bitmask"
    place.mkdir()
    try:
        result = {
            "benchmark": "bitmask",
            "model": "swin_base_patch4_window7_224",
            "sparsity": 0.55,
            "memory": {name: in_memory(dtype) for name, dtype in DTYPES.items()},
            "disk": {n: on_disk(DTYPES[n], place) for n in ("float32", "bfloat16")},
        }
    finally:
        shutil.rmtree(place)
    print(json.dumps(result, indent=1))
    if options.save:
        save("bitmask", result | {"machine": machine()})


def in_memory(dtype: torch.dtype) -> dict[str, float]:
    """GB of dense weights a second."""
    weights, layers, modules, keep = problem("swin_b", dtype)
    ops.prune_(weights, layers, modules, keep)
    packed = [ops.pack(w) for w in weights]
    size = sum(w.nbytes for w in weights)
    times = time_in_turns(
        {
            "pack": lambda: [ops.pack(w) for w in weights],
            "unpack": lambda: [
                ops.unpack(bits, values, w.shape)
                for (bits, values), w in zip(packed, weights, strict=True)
            ],
            "clone": lambda: [w.clone() for w in weights],
        },
        repeats=7,
    )
    for (bits, values), w in zip(packed, weights, strict=True):
        assert torch.equal(ops.unpack(bits, values, w.shape), w)
    return {f"{name}_gb_per_s": round(size / t / 1e9, 2) for name, t in times.items()}


def on_disk(dtype: torch.dtype, place: Path) -> dict[str, float]:
    """Seconds, and bytes; the dense file that comes back is compared."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("swin_base_patch4_window7_224").state_dict()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    source, dense, packed, back = (
        place / f"{name}.safetensors" for name in ("in", "dense", "packed", "back")
    )
    save_file({n: t.contiguous() for n, t in state.items()}, source, {"format": "pt"})

    def fresh(path: Path) -> None:
        path.unlink(missing_ok=True)

    times = time_in_turns(
        {
            "prune": lambda: stream.prune_checkpoint(source, dense, 0.55),
            "prune_to_bitmask": lambda: stream.prune_checkpoint(
                source, packed, 0.55, format="bitmask"
            ),
            "expand": lambda: expand(packed, back),
            "load_file": lambda: dimap.load_file(packed),
        },
        repeats=3,
        prepare={
            "prune": lambda: fresh(dense),
            "prune_to_bitmask": lambda: fresh(packed),
            "expand": lambda: fresh(back),
        },
    )
    assert back.read_bytes() == dense.read_bytes()
    before, after = dense.stat().st_size, packed.stat().st_size
    return {
        "dense_bytes": before,
        "bitmask_bytes": after,
        "ratio": round(after / before, 4),
        **{f"{name}_seconds": round(t, 3) for name, t in times.items()},
        **{
            f"{name}_gb_per_s": round(before / times[name] / 1e9, 2)
            for name in ("prune_to_bitmask", "expand", "load_file")
        },
    }


if __name__ == "__main__":
    main()
