"""The commands from their start to their end, beside `python -c "import torch"`.

    python benchmarks/bench_commands.py [--save]

What a user waits for: `dimap --help`, `dimap inspect` and `dimap prune` of a Swin-T in float32, as
processes of their own, in turns, all files in the page cache. Importing torch is the yardstick,
because every tool built on it pays that first; these commands do not. Times are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
from harness import machine, save
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/commands.json"
    )
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.rounds)
    print(json.dumps(result, indent=2))
    if options.save:
        save("commands", result | {"machine": machine()})


def measure(folder: Path, rounds: int) -> dict[str, object]:
    source, out = folder / "swin_t.safetensors", folder / "pruned.safetensors"
    model = timm.create_model("swin_tiny_patch4_window7_224")
    save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, source)
    dimap = [sys.executable, "-m", "dimap"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "dimap --help": [*dimap, "--help"],
        "dimap inspect": [*dimap, "inspect", str(source)],
        "dimap prune": [*dimap, "prune", str(source), str(out), "--sparsity", "0.55"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            out.unlink(missing_ok=True)
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(found) for name, found in times.items()}
    return {
        "benchmark": "commands",
        "megabytes": round(source.stat().st_size / 1e6, 1),
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "all_seconds": {name: [round(t, 3) for t in found] for name, found in times.items()},
        "beside_import_torch": {
            name: round(value / median["import torch"], 3) for name, value in median.items()
        },
    }


if __name__ == "__main__":
    main()
