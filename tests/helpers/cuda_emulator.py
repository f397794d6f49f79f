"""Build the CUDA operators for the host, and beside them the PTX that nvcc makes of their kernels.

See tests/cuda/emulator/emulator.h for the device, and tests/cuda/ptx/translate.py for the PTX.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
PTX = ROOT / "tests" / "cuda" / "ptx"
SOURCES = ROOT / "csrc"
CACHE = ROOT / "build" / "emulated"
COMPILER = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHITECTURE = "sm_90"
# Small pieces, samples and slots: problems of a few thousand weights take every path.
TUNING = (
    "{.chunk = 1 << 10, .sample_ratio = 8, .sample_least = 256, .least_aside = 32, .most_aside = 768, "
    ".aside_budget = 1 << 17, .sorters = 256, .sorted = 3, .most_buckets = 24, .table_threads = 256}"
)
KERNEL = re.compile(r"^([0-9a-f]+) [tTwW] (\S*\d[a-z_]+_kernel\S*)$", re.M)

sys.path.insert(0, str(PTX))
import translate  # noqa: E402


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _texts(*paths: Path) -> str:
    return _digest(*(p.read_text() for p in sorted(paths)))


class Emulated:
    """The library: operators as `torch.ops.dimap_emulated`, and how its kernels run."""

    def __init__(self, path: Path, sites: list[translate.Site], registers: dict[str, int]):
        self.path = path
        self.sites = sites
        self.library = ctypes.CDLL(str(path))
        self.library.dimap_ptx_found.restype = ctypes.c_char_p
        self.library.dimap_ptx_seen.restype = ctypes.POINTER(ctypes.c_char)
        self.registers = registers
        self.register(registers)

    def register(self, registers: dict[str, int]) -> None:
        """Tell the library which PTX is which kernel's, and how many registers a thread of it takes."""
        names = subprocess.run(["nm", str(self.path)], capture_output=True, text=True, check=True)
        known = re.search(r"^([0-9a-f]+) T dimap_ptx_plant$", names.stdout, re.M)
        assert known is not None
        here = ctypes.cast(self.library.dimap_ptx_plant, ctypes.c_void_p).value
        base = (here or 0) - int(known[1], 16)
        missing = set(registers)
        for offset, mangled in KERNEL.findall(names.stdout):
            if ".cold" in mangled or "GLOBAL__N_" not in mangled:
                continue
            key = translate.key_of(mangled)
            address = ctypes.c_void_p(base + int(offset, 16))
            if self.library.dimap_ptx_register(address, key.encode(), registers.get(key, 255)):
                missing.discard(key)
        assert not missing, f"PTX without a kernel of the host: {missing}"

    def _counter(self, name: str) -> ctypes.c_int:
        return ctypes.c_int.in_dll(self.library, f"dimap_emulated_{name}")

    @property
    def host_calls(self) -> int:
        return self._counter("host_calls").value

    @property
    def host_bytes(self) -> int:
        return self._counter("host_bytes").value

    def give_shared(self, most: int) -> None:
        """Let a block ask for so many bytes of shared memory."""
        self._counter("shared").value = most

    def run_ptx(self, on: bool, preempts: bool = False) -> None:
        """Run kernels as PTX, or as their sources; let other threads run at any access to memory."""
        ctypes.c_int.in_dll(self.library, "dimap_emulated_ptx").value = int(on)
        ctypes.c_int.in_dll(self.library, "dimap_ptx_preempts").value = int(preempts)

    def found(self) -> list[str]:
        """What the checks of the PTX have found since the last call."""
        return self.library.dimap_ptx_found().decode().splitlines()

    def dependent_loads(self, kernel: str) -> int:
        """Loads of global memory that waited for one another, in the last launch of a kernel."""
        return self.library.dimap_ptx_loads(kernel.encode())

    def plant(self, site: int = -1) -> None:
        """Make the instruction at a site go wrong; -1: none."""
        self.library.dimap_ptx_plant(site)

    def sites_seen(self) -> list[int]:
        """Sites that have run since the last call."""
        seen = self.library.dimap_ptx_seen()
        found = [i for i in range(len(self.sites)) if seen[i] != b"\0"]
        ctypes.memset(seen, 0, len(self.sites))
        return found


def build(*flags: str, tuning: str = TUNING, kernels: tuple[Path, ...] = ()) -> Emulated:
    """Compile kernels and operators, the kernels with their checks for the host on, and load them.

    `kernels`: these alone, in place of the library's. What has not changed since the last time lies in build/emulated.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be at it
        return _build(flags, tuning, kernels)


def _build(flags: tuple[str, ...], tuning: str, kernels: tuple[Path, ...]) -> Emulated:
    torch_root = Path(torch.__file__).parent
    kernels_headers = [h for room in ("core", "cuda") for h in (SOURCES / room).glob("*.*h")]
    of_kernels = _texts(*kernels_headers)
    of_bindings = _texts(
        *(h for h in (SOURCES / "bindings").glob("*.h") if not h.name.startswith("cpu"))
    )
    of_emulator, of_ptx = _texts(*EMULATOR.rglob("*.h")), _texts(*PTX.glob("*.h"))
    common = [f"-I{SOURCES}"]
    if tuning:
        made = CACHE / f"tuning-{_digest(tuning)}.h"
        made.write_text(f"#define DIMAP_TUNING {tuning}\n")
        common += ["-include", str(made)]
    host = [
        str(COMPILER), "-std=gnu++20", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-U_FORTIFY_SOURCE",
        "-include", str(EMULATOR / "emulator.h"), f"-I{EMULATOR}", f"-I{PTX}", *common,
        "-isystem", str(torch_root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", *flags,
    ]  # fmt: skip
    device = [str(NVCC), "-std=c++20", "-O3", f"-arch={ARCHITECTURE}", *common]

    def run(command: list[str], source: Path, ending: str, *headers: str) -> tuple[Path, str]:
        """What the command makes of the source, and what it says, once for all that they depend on."""
        key = _digest(*headers, source.read_text(), *command)
        result = CACHE / f"{source.stem}-{key}{ending}"
        said = result.with_suffix(ending + ".txt")
        if not said.exists():
            report = subprocess.run(
                [*command, str(source), "-o", str(result)],
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert report.returncode == 0, report.stderr
            said.write_text(report.stderr)
        return result, said.read_text()

    def compile_one(source: Path) -> Path:
        headers = [of_emulator, of_ptx if source.parent == PTX else of_kernels]
        if source.suffix != ".cu":
            headers += [of_bindings, torch.__version__]
        return run([*host, "-O2", "-x", "c++", "-c"], source, ".o", *headers)[0]

    def compile_ptx(source: Path) -> Path:
        # -O1: the functions are long, and most of their time goes to the checks.
        return run([*host, "-O1", "-w", "-c"], source, ".o", of_emulator, of_ptx)[0]

    def ptx_of(source: Path) -> tuple[Path, dict[str, int]]:
        ptx = run([*device, "-ptx", "-lineinfo"], source, ".ptx", of_kernels)[0]
        report = run([*device, "-cubin", "-Xptxas=-v"], ptx, ".cubin")[1]
        used = re.findall(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", report, re.S)
        return ptx, {translate.key_of(name): int(count) for name, count in used}

    cuda = list(kernels) or sorted((SOURCES / "cuda").glob("*.cu"))
    sources = [EMULATOR / "emulator.cpp", PTX / "ptx.cpp"]
    if kernels:
        sources += kernels
    else:
        sources += [
            *cuda,
            EMULATOR / "dynamic_shared.cpp",
            EMULATOR / "schemas.cpp",
        ]
        sources += sorted((SOURCES / "bindings").glob("cuda_*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(ptx_of, cuda)) if NVCC else []
        with tempfile.TemporaryDirectory() as folder:
            translated, sites = translate.translate([ptx for ptx, _ in texts], Path(folder))
            made = [pool.submit(compile_ptx, s) for s in translated]
            made += [pool.submit(compile_one, s) for s in sources]
            objects = [str(m.result()) for m in made]
    library = CACHE / f"libdimap_emulated-{_digest(*objects)}.so"
    libraries = [f"{torch_root}/lib/lib{name}.so" for name in ("torch", "torch_cpu")]
    if not library.exists():
        link = [
            str(COMPILER),
            "-shared",
            *flags,
            *objects,
            *libraries,
            "-pthread",
            "-o",
            str(library),
        ]
        subprocess.run(link, check=True)
    return Emulated(library, sites, {k: n for _, names in texts for k, n in names.items()})
