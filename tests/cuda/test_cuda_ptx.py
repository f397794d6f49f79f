"""The checks that the emulator makes of PTX: each finds a fault of its kind, and none where there is no fault."""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cuda_emulator
import pytest
import torch
from problems import cast, values

pytestmark = pytest.mark.skipif(
    cuda_emulator.COMPILER is None or cuda_emulator.NVCC is None or platform.system() != "Linux",
    reason="needs nvcc and a C++ compiler",
)

FAULTS = {
    "none": "",
    "a barrier left out": "race on shared memory",
    "a warp's barrier left out": "race on shared memory",
    "a fence left out": "what another block wrote",
    "a grid barrier left out": "what another block wrote|memory that nobody has written",
    "a vector between two": "misaligned",
    "an unset word of shared memory": "shared memory that nobody has written",
    "an unset word of workspace": "memory that nobody has written",
    "a wrong lane": "",
}


@pytest.fixture(scope="module")
def faults() -> cuda_emulator.Emulated:
    library = cuda_emulator.build(kernels=(cuda_emulator.PTX / "faults.cu",))
    library.run_ptx(True)
    return library


@pytest.mark.parametrize("fault", FAULTS)
def test_each_kind_of_fault_is_found(faults: cuda_emulator.Emulated, fault: str) -> None:
    result = faults.library.dimap_run_fault(list(FAULTS).index(fault), 3, 256, 0)
    found = "\n".join(faults.found())
    if fault == "none":
        assert (result, found) == (1, "")
    elif fault == "a wrong lane":
        assert (result, found) == (
            0,
            "",
        )  # no check knows which lane was meant: the result shows it
    else:
        assert any(what in found for what in FAULTS[fault].split("|")), found


@pytest.mark.parametrize(
    ("blocks", "threads", "dynamic", "what"),
    [
        (3, 512, 0, "more threads than the kernel was compiled for"),
        (3, 256, 60_000, "more shared memory than was asked for"),
        (200, 256, 0, "more blocks than are resident"),
    ],
)
def test_launches_beyond_a_limit_fail(
    faults: cuda_emulator.Emulated, blocks: int, threads: int, dynamic: int, what: str
) -> None:
    assert faults.library.dimap_run_fault(0, blocks, threads, dynamic) == -1
    assert what in "\n".join(faults.found())


def test_a_kernel_with_too_many_registers_does_not_start(faults: cuda_emulator.Emulated) -> None:
    before = faults.registers
    faults.register(dict.fromkeys(before, 300))
    assert faults.library.dimap_run_fault(0, 3, 256, 0) == -1
    assert "more registers or shared memory" in "\n".join(faults.found())
    faults.register(before)
    assert faults.library.dimap_run_fault(0, 3, 256, 0) == 1


def test_loads_that_wait_for_each_other_are_counted(faults: cuda_emulator.Emulated) -> None:
    # Its weights, the sums of eight warps, the counter and the sums of three blocks, the grid's barrier, these sums again.
    faults.library.dimap_run_fault(0, 3, 256, 0)
    assert 8 <= faults.dependent_loads("fault_kernel") <= 24


@pytest.mark.parametrize(
    "text", ["add.rz.f32 %f1, %f1, %f1", "frob.u32 %r1, %r1, %r1", "bar.sync 1"]
)
def test_instructions_that_nobody_taught_it_are_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.ptx"
    path.write_text(
        f".entry _Z8a_kernelE(\n)\n{{\n.reg .f32 %f<2>;\n.reg .b32 %r<2>;\n{text};\nret;\n}}\n"
    )
    with pytest.raises(ValueError, match=r"unknown|must be"):
        cuda_emulator.translate.translate([path], tmp_path)


# Faults in the library's own PTX.


@pytest.fixture(scope="module")
def library() -> Iterator[cuda_emulator.Emulated]:
    library = cuda_emulator.build()
    torch.ops.load_library(str(library.path))
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no other
    library.run_ptx(True)
    yield library
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def _run() -> list[torch.Tensor]:
    operators = torch.ops.dimap_emulated
    weights = [cast(values(kind, n, n), t) for kind, n, t in (("normal", 3000, torch.float32), ("two values", 2500, torch.bfloat16), ("sorted", 2100, torch.float32))]  # fmt: skip
    layers, modules, keep = [0, 1, 2], [0, 0, 1], [3000, 500]
    masks, thresholds = operators.select_cuts(weights, layers, modules, keep)
    scores = operators.score(weights, layers)
    operators.prune_(weights, layers, modules, keep)
    return [*masks, thresholds, *scores, *weights]


def _caught(library: cuda_emulator.Emulated, site: int, want: list[torch.Tensor]) -> bool:
    """Whether a fault changes a result, is found, or ends or stops the program: tried in a child."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        library.plant(site)
        same = all(
            torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
            for a, b in zip(_run(), want, strict=True)
        )
        os._exit(0 if same and not library.found() else 1)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def _missed(library: cuda_emulator.Emulated, kind: str, most: int) -> tuple[list[str], int]:
    library.sites_seen()
    want = _run()
    assert library.found() == []
    seen = [i for i in library.sites_seen() if library.sites[i].kind == kind]
    if kind == "lane":
        seen = [i for i in seen if library.sites[i].kernel.startswith(SCANNING)]
    if kind == "store":
        seen = [i for i in seen if not library.sites[i].kernel.startswith(GUESSING)]
    chosen = seen[:: max(1, len(seen) // most)][:most]
    return [str(library.sites[i]) for i in chosen if not _caught(library, i, want)], len(chosen)


# Where each lane always has something to give: other kernels add up what mostly is not there.
SCANNING = ("bucket_", "fix_", "group_", "partition_", "share_", "small_")
# Where a word that is not set makes a wrong guess, which costs another reading and changes no bit.
GUESSING = ("guess_",)
# A second barrier right after the first, or a value that happens to be there already: not every fault shows.
SHARES = {"vector": 0.0, "store": 0.5, "lane": 0.7, "barrier": 0.7, "release": 0.7, "acquire": 0.7}


@pytest.mark.parametrize("kind", SHARES)
def test_planted_faults_are_caught(library: cuda_emulator.Emulated, kind: str) -> None:
    missed, tried = _missed(library, kind, 8)
    assert tried >= 4
    assert len(missed) <= SHARES[kind] * tried, missed


@pytest.mark.large
@pytest.mark.parametrize("kind", SHARES)
def test_many_planted_faults(library: cuda_emulator.Emulated, kind: str) -> None:
    missed, tried = _missed(library, kind, 24)
    print(f"{kind}: {len(missed)} of {tried} missed", *sorted(Counter(missed).items()), sep="\n")
    assert len(missed) <= SHARES[kind] * tried
