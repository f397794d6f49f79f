"""What was compiled for AVX2 and AVX-512 is reached through the function pointer alone.

The object files tell: no other one holds an instruction that an x86-64 processor may lack; those that do
run nothing at start-up, and export nothing that the linker could take for portable code.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

BUILD = Path(__file__).resolve().parents[2] / "build"
VARIANTS = {
    f"{p.name}.o": p.stem.rsplit("_", 1)[1]
    for p in sorted((BUILD.parent / "csrc" / "cpu").glob("**/*_avx*.cpp"))
}
# Beyond x86-64's SSE2: SSE3 to SSE4.2, BMI and their like, and all with a VEX or EVEX prefix. tzcnt is not among them: to
# older processors it is bsf, and compilers use it where both give the same.
BEYOND = re.compile(
    r"v(?!err|erw|mcall)[a-z0-9]+"
    r"|andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt|movbe|crc32"
    r"|addsub[ps][sd]|hadd[ps][sd]|hsub[ps][sd]|movddup|movs[hl]dup|lddqu"
    r"|pabs[bwd]|palignr|ph(?:add|sub)s?[wd]|pmaddubsw|pmulhrsw|pshufb|psign[bwd]"
    r"|blendv?p[sd]|dpp[sd]|extractps|insertps|mpsadbw|packusdw|pblend(?:w|vb)|pcmp(?:eqq|gtq)"
    r"|pcmp[ei]str[im]|p(?:ext|ins)r[bdq]|phminposuw|p(?:max|min)(?:sb|sd|ud|uw)|pmov[sz]x\w+"
    r"|pmul(?:dq|ld)|ptest|round[ps][sd]|aes\w+|pclmul\w+"
)
pytestmark = pytest.mark.skipif(
    not shutil.which("objdump") or not shutil.which("readelf"), reason="needs binutils"
)


def build() -> Path:
    """The folder of the package's newest build."""
    archives = sorted(BUILD.glob("*/libdimap_kernels.a"), key=lambda p: p.stat().st_mtime)
    if not archives:
        pytest.skip("needs the folder in which the package was built")
    return archives[-1].parent


def objects() -> dict[str, Path]:
    """The object files of the kernels and of the CPU operators."""
    root = build() / "CMakeFiles"
    kernels = {p.name: p for p in (root / "dimap_kernels.dir").rglob("*.o")}
    return kernels | {f"ops/{p.name}": p for p in (root / "dimap_ops.dir").rglob("*.o")}


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def beyond(path: Path) -> frozenset[str]:
    """The mnemonics in an object file that not every x86-64 processor has."""
    code = tool("objdump", "--disassemble", "--no-show-raw-insn", "--insn-width=16", str(path))
    if "x86-64" not in code:
        pytest.skip("not an x86-64 build")
    found = re.findall(
        r"^\s+[0-9a-f]+:\s+(?:(?:lock|rep[nz]*|data16|cs|bnd|notrack)\s+)*(\w+)", code, re.M
    )
    assert found
    return frozenset(m for m in found if BEYOND.fullmatch(m))


def test_all_sources_are_looked_at() -> None:
    sources = {
        p.name + ".o" for d in ("core", "cpu") for p in (BUILD.parent / "csrc" / d).glob("**/*.cpp")
    }
    assert sources <= set(objects())
    assert {"avx2", "avx512"} == set(VARIANTS.values())


def test_portable_objects_have_the_instructions_of_any_processor() -> None:
    found = {name: beyond(path) for name, path in objects().items() if name not in VARIANTS}
    assert len(found) > 15
    assert {name: sorted(mnemonics) for name, mnemonics in found.items() if mnemonics} == {}


def test_only_variants_are_compiled_for_more() -> None:
    # _C is compiled when it is linked: its flags tell, for its objects hold no instructions.
    ninja = (build() / "build.ninja").read_text()
    flags = re.findall(
        r"^build (\S+?\.cpp\.o):[^\n]*\n(?:  (?!FLAGS).*\n)*  FLAGS = (.*)$", ninja, re.M
    )
    assert {"module.cpp.o", "engine.cpp.o", "decide_avx2.cpp.o"} <= {Path(o).name for o, _ in flags}
    more = {Path(o).name for o, given in flags if re.search(r"(^|\s)-m(?!tune)", given)}
    assert more == set(VARIANTS)
    links = re.findall(r"^  (?:LINK_FLAGS|LANGUAGE_COMPILE_FLAGS) = (.*)$", ninja, re.M)
    assert not any(re.search(r"(^|\s)-m", given) for given in links)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_have_more_instructions(name: str) -> None:
    assert len(beyond(objects()[name])) > 5  # the check above sees what it looks for


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run_nothing_at_start_up(name: str) -> None:
    sections = tool("readelf", "--sections", "--wide", str(objects()[name]))
    assert ".text" in sections
    assert not re.search(r"\.(init_array|preinit_array|ctors|init|fini_array|dtors)\b", sections)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_share_no_inline_code(name: str) -> None:
    # A weak or COMDAT function may be kept for all others: then portable code would run it.
    symbols = [line.split() for line in tool("nm", str(objects()[name])).splitlines()]
    shared = [s[-1] for s in symbols if s[-2] in "WVuwv" and s[-2] != "w"]
    assert shared == []
    exported = {s[-1] for s in symbols if s[-2] in "TDRBC"}
    assert exported
    assert all(VARIANTS[name] in s.lower() for s in exported)
