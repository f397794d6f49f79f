"""Bitmask and compact files: packing and unpacking in dense bytes a second, and their size.

    python benchmarks/bench_bitmask.py [--save] [--trained FILE.safetensors ...]

Swin-B, pruned at 55 %: in memory, `dimap.ops.pack` and `unpack` of all prunable weights beside
`Tensor.clone` of the same; on disk, `dimap prune` to dense, bitmask and compact files, and
`dimap expand`, of the whole model as a safetensors file; the coder of compact files alone, from memory
and to memory. Its weights are random: sizes are of trained ones, pruned at 55 % in each dtype, and
beside them what zstd alone makes of the pruned file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import deque
from pathlib import Path

import dimap
import torch
from dimap import _C, ops, stream
from dimap.bench.shapes import problem
from dimap.bitmask import expand
from dimap.checkpoint import compact
from harness import machine, save, time_in_turns
from safetensors.torch import save_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/PART.json")
    parser.add_argument(
        "--parts", nargs="*", default=["bitmask", "compact"], choices=["bitmask", "compact"]
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where there is 1.5 GB of room"
    )
    parser.add_argument(
        "--trained", type=Path, nargs="*", default=[], help="checkpoints of known families"
    )
    options = parser.parse_args()
    place = options.folder / "bench-bitmask"
    place.mkdir()
    disk = ("float32", "bfloat16")
    about = {"model": "swin_base_patch4_window7_224", "sparsity": 0.55}
    try:
        for part in options.parts:
            if part == "bitmask":
                found = {"memory": {name: in_memory(dtype) for name, dtype in DTYPES.items()}}
            else:
                found = {
                    "coder": {name: coder(DTYPES[name]) for name in disk},
                    "sizes": [
                        {"model": file.stem, "dtype": name, **sizes(file, dtype, place)}
                        for file in options.trained
                        for name, dtype in DTYPES.items()
                    ],
                }
            found["disk"] = {name: on_disk(DTYPES[name], place) for name in disk}
            result = {"benchmark": part, **about, **found}
            print(json.dumps(result, indent=1))
            if options.save:
                save(part, result | {"machine": machine()})
    finally:
        shutil.rmtree(place)


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


def coder(dtype: torch.dtype) -> dict[str, float]:
    """GB of dense weights a second, of each thread and of all of them."""
    weights, layers, modules, keep = problem("swin_b", dtype)
    ops.prune_(weights, layers, modules, keep)
    data = memoryview(torch.cat([w.reshape(-1) for w in weights]).view(torch.uint8).numpy())
    size = dtype.itemsize
    pieces = [data[at : at + compact.STEP] for at in range(0, len(data), compact.STEP)]
    frames = [compact.encode(piece, size) for piece in pieces]
    blocks = [
        (compact.Block(0, len(f), int.from_bytes(f[-4:], "little"), 0, len(p) // size), f)
        for p, f in zip(pieces, frames, strict=True)
    ]

    def run(job, items) -> None:
        deque(compact.in_parallel(job, items), maxlen=0)

    jobs = {
        "compress": lambda: run(lambda piece: compact.encode(piece, size), pieces),
        "decompress": lambda: run(lambda b: compact.decode(b[1], b[0], size, "here"), blocks),
    }
    rates = {}
    for name, seconds in time_in_turns(jobs, repeats=5).items():
        rates[f"{name}_gb_per_s"] = round(len(data) / seconds / 1e9, 2)
        begun = time.process_time()
        jobs[name]()
        rates[f"{name}_gb_per_s_of_a_core"] = round(
            len(data) / (time.process_time() - begun) / 1e9, 2
        )
    return {"threads": _C.threads(), "ratio": round(sum(map(len, frames)) / len(data), 4), **rates}


def sizes(file: Path, dtype: torch.dtype, place: Path) -> dict[str, float]:
    """Bytes beside those of the dense file; of zstd at several levels."""
    import zstandard

    state = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in dimap.load_file(file).items()
    }
    save_file(state, place / "in.safetensors", {"format": "pt"})
    found = {}
    for form in ("dense", "bitmask", "compact"):
        out = place / f"{form}.safetensors"
        report = stream.prune_checkpoint(
            place / "in.safetensors", out, 0.55, format=form, force=True
        ).report()
        found[form] = out.stat().st_size
    dense = (place / "dense.safetensors").read_bytes()
    for level in (3, 9):
        found[f"zstd -{level}"] = len(zstandard.compress(dense, level))
    found["zstd -3 of the bitmask file"] = len(
        zstandard.compress((place / "bitmask.safetensors").read_bytes(), 3)
    )
    pruned = sum(m.weights for m in report.modules if m.name != "aux") / sum(
        t.numel() for t in state.values()
    )
    return {
        "dense_bytes": found["dense"],
        "weights_that_are_pruned": round(pruned, 4),
        "ratio": {name: round(size / found["dense"], 4) for name, size in found.items()},
    }


def on_disk(dtype: torch.dtype, place: Path) -> dict[str, float]:
    """Seconds, and bytes; the dense file that comes back is compared."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("swin_base_patch4_window7_224").state_dict()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    source, dense, packed, small, back = (
        place / f"{name}.safetensors" for name in ("in", "dense", "packed", "small", "back")
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
            "prune_to_compact": lambda: stream.prune_checkpoint(
                source, small, 0.55, format="compact"
            ),
            "expand": lambda: expand(packed, back),
            "expand_compact": lambda: expand(small, back),
            "load_file": lambda: dimap.load_file(packed),
            "load_compact": lambda: dimap.load_file(small),
        },
        repeats=3,
        prepare={
            "prune": lambda: fresh(dense),
            "prune_to_bitmask": lambda: fresh(packed),
            "prune_to_compact": lambda: fresh(small),
            "expand": lambda: fresh(back),
            "expand_compact": lambda: fresh(back),
        },
    )
    assert back.read_bytes() == dense.read_bytes()
    before, after = dense.stat().st_size, packed.stat().st_size
    return {
        "dense_bytes": before,
        "bitmask_bytes": after,
        "ratio": round(after / before, 4),
        **{f"{name}_seconds": round(t, 3) for name, t in times.items()},
        **{f"{name}_gb_per_s": round(before / times[name] / 1e9, 2) for name in times},
    }


if __name__ == "__main__":
    main()
