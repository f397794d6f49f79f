"""Build and load the CUDA operators for the host: see tests/cuda/emulator/emulator.h."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
SOURCES = ROOT / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++")
# Small pieces, samples and slots: problems of a few thousand weights take every path.
TUNING = (
    "{.chunk = 1 << 10, .sample_ratio = 8, .sample_least = 256, .least_aside = 32, .most_aside = 768, "
    ".aside_budget = 1 << 17}"
)


def build(folder: Path, *flags: str) -> Path:
    """Compile kernels and operators, the kernels with their checks for the host on; return the library."""
    torch_root = Path(torch.__file__).parent
    common = [
        str(COMPILER), "-std=gnu++20", "-O2", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes",
        "-U_FORTIFY_SOURCE", "-include", str(EMULATOR / "emulator.h"), f"-I{EMULATOR}", f"-I{SOURCES}",
        "-isystem", str(torch_root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
        f"-DDIMAP_TUNING={TUNING}", *flags,
    ]  # fmt: skip
    sources = [s for s in (SOURCES / "cuda").glob("*.cu") if s.name != "score.cu"]
    sources += [*EMULATOR.glob("*.cpp"), *(SOURCES / "bindings").glob("cuda_*.cpp")]
    sources.append(SOURCES / "core" / "solve.cpp")

    def compile_one(source: Path) -> Path:
        built = folder / f"{source.parent.name}_{source.stem}.o"
        subprocess.run(
            [*common, "-x", "c++", "-c", str(source), "-o", str(built)], check=True, timeout=300
        )
        return built

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libdimap_emulated.so"
    libraries = [f"{torch_root}/lib/lib{name}.so" for name in ("torch", "torch_cpu")]
    subprocess.run(
        [str(COMPILER), "-shared", *flags, *map(str, objects), *libraries, "-pthread", "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library
