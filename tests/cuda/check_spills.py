"""Compile every CUDA kernel for every architecture and fail on a register spill; print the registers.

    python tests/cuda/check_spills.py [nvcc]

Needs nvcc 12.8 or later, no GPU. The table is Markdown: architecture by kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
KERNEL = re.compile(r"\d+([a-z_]+_kernel)(I\w+?E)?v?")


def main() -> int:
    nvcc = sys.argv[1] if len(sys.argv) > 1 else "nvcc"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    table: dict[str, dict[str, str]] = {}
    spilled = 0
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                nvcc,
                "-std=c++20",
                "-O3",
                "-Xptxas=-v",
                *targets,
                "-I",
                str(ROOT / "csrc"),
                "-c",
                str(source),
            ]
            report = subprocess.run(
                [*command, "-o", f"{folder}/out.o"], capture_output=True, text=True, check=False
            )
        if report.returncode:
            sys.exit(report.stderr)
        name = architecture = ""
        for line in report.stderr.splitlines():
            if found := ENTRY.search(line):
                kernel = KERNEL.search(found[1])
                name = f"{source.stem}: " + (
                    (kernel[1] + (kernel[2] or "")) if kernel else found[1]
                )
                architecture = found[2]
            elif (found := SPILL.search(line)) and (found[1] != "0" or found[2] != "0"):
                spilled += 1
                print(f"spill: {name} sm_{architecture}: {line.strip()}")
            elif found := USED.search(line):
                table.setdefault(name, {})[architecture] = found[1]
    print("| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
    print("|---" * (len(ARCHITECTURES) + 1) + "|")
    for name, registers in table.items():
        print(f"| {name} | " + " | ".join(registers.get(a, "-") for a in ARCHITECTURES) + " |")
    return 1 if spilled or not table else 0


if __name__ == "__main__":
    sys.exit(main())
