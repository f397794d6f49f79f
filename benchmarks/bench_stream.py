"""Prune checkpoints as they stream by, against `cp -r` of the same folder on the same disk.

    python benchmarks/bench_stream.py --save                  # float32, 1.2 GB
    python benchmarks/bench_stream.py --save --size 12 --dtype bfloat16 --folder /a/large/disk

Each round runs, in turns: `cp -r`; `cp -r` and `sync` of the copy, which is what it takes to have
it on the disk; dimap, which always brings its output to the disk before it appears. The output of
the job before is deleted and the disk quiet before each; a copy that is thrown away has warmed up
the page cache. The peak of dimap's resident memory is
counted above that after `import dimap`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from dimap import stream
from harness import _status, machine, save

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
SHARD = 2_000_000_000  # bytes, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/stream_*.json"
    )
    parser.add_argument("--size", type=float, default=1.2, help="GB of the checkpoint")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where there is room for 2")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    place = options.folder / "bench-stream"
    place.mkdir()
    try:
        measure(place, options)
    finally:
        shutil.rmtree(place)


imported = _status("VmRSS")  # with the imports alone


def measure(place: Path, options: argparse.Namespace) -> None:
    source = place / "in"
    size = write_checkpoint(source, options.size * 1e9, *DTYPES[options.dtype])
    os.sync()
    out = place / "out"
    pruned: list[stream.StreamPruning] = []
    steps: list[tuple[str, float]] = []

    class Progress:
        def step(self, description: str, total: int | None = None) -> None:
            steps.append((description, round(time.perf_counter() - start, 3)))

        def advance(self, amount: int) -> None:
            pass

    def copy() -> None:
        subprocess.run(["cp", "-r", source, out], check=True)

    def copy_and_sync() -> None:
        copy()
        subprocess.run(["sync", *out.iterdir(), out], check=True)

    def prune() -> None:
        pruned.append(stream.prune_checkpoint(source, out, 0.55, progress=Progress()))

    jobs = {"cp": copy, "cp and sync": copy_and_sync, "dimap": prune}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    memory = 0
    for turn in range(options.rounds + 1):
        for name, job in jobs.items():
            # A copy that is thrown away first: a machine that gives unused memory back to its host
            # is slow to get it again, and no job shall pay for what the job before did not touch.
            shutil.rmtree(out, ignore_errors=True)
            copy()
            shutil.rmtree(out)
            os.sync()
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
            steps.clear()
            start = time.perf_counter()
            job()
            seconds = time.perf_counter() - start
            if name == "dimap":
                memory = max(memory, _status("VmHWM") - imported)
            if turn:  # the first is a warm-up
                times[name].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    result = {
        "benchmark": "stream",
        "gigabytes": round(size / 1e9, 2),
        "dtype": options.dtype,
        "shards": len(list(source.glob("*.safetensors"))),
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "all_seconds": {name: [round(t, 3) for t in found] for name, found in times.items()},
        "ratio_to_cp": round(median["dimap"] / median["cp"], 2),
        "ratio_to_cp_and_sync": round(median["dimap"] / median["cp and sync"], 2),
        "memory_above_import_mb": round(memory / 1e6, 1),
        "readings_to_find_the_cuts": max(p.readings for p in pruned),
        "steps": steps,
    }
    print(json.dumps(result, indent=2))
    if options.save:
        save(f"stream_{options.dtype}_{options.size:g}GB", result | {"machine": machine()})


def write_checkpoint(folder: Path, size: float, kind: str, dtype: torch.dtype) -> int:
    """A ViT of about `size` bytes in shards: normal weights, rows and layers of different scales."""
    folder.mkdir()
    width = 1024 if size < 3e9 else 4096
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator) * 0.02
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for i in range(max(1, round(size / (12 * width * width * dtype.itemsize)))):
        for name, shape in (
            ("norm1", (width,)), ("attn.qkv", (3 * width, width)), ("attn.proj", (width, width)),
            ("norm2", (width,)), ("mlp.fc1", (4 * width, width)), ("mlp.fc2", (width, 4 * width)),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"head.weight": (1000, width), "head.bias": (1000,)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0.0
    for name, shape in shapes.items():
        if filled > min(SHARD, size / 3):
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += torch.Size(shape).numel() * dtype.itemsize
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for name, shape in shard.items():
            end = at + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            index[name], at = file, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for shape in shard.values():
                for part in weights(noise, shape, generator):
                    out.write(part.to(dtype).view(torch.uint8).numpy().data)
        total += 8 + len(text) + at
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    return total


def weights(
    noise: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """A tensor in flat parts of at most the noise's length, rows about 20 % apart in scale."""
    count, row = torch.Size(shape).numel(), shape[-1]
    shift = int(torch.randint(len(noise), (1,), generator=generator))
    scale = 0.5 + float(torch.rand((), generator=generator))
    for start in range(0, count, len(noise)):
        n = min(len(noise), count - start)
        part = noise.roll(shift + start // len(noise) * 1013)[:n] * scale
        if n % row == 0:
            rows = 1 + 0.2 * torch.randn(n // row, 1, generator=generator)
            part = (part.view(-1, row) * rows).view(-1)
        yield part


if __name__ == "__main__":
    main()
