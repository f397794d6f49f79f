"""Translate PTX, as nvcc makes it of the kernels, to C++ that the emulator runs: a function for each entry.

Registers become local variables of their type; memory, barriers and warps go through ptx.h, which checks them. What a
planted fault may change (a barrier, a fence, a store, a vector, a lane) is a numbered *site*. Instructions and
qualifiers that the kernels do not use are an error here, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

C_TYPES = {
    "pred": "bool", "f32": "float", "f64": "double", "b8": "uint8_t", "b16": "uint16_t", "b32": "uint32_t",
    "b64": "uint64_t", "u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t", "s8": "int8_t",
    "s16": "int16_t", "s32": "int32_t", "s64": "int64_t",
}  # fmt: skip
SPECIAL = {
    "%tid.x": "threadIdx.x", "%ctaid.x": "blockIdx.x", "%ntid.x": "blockDim.x", "%nctaid.x": "gridDim.x",
    "%laneid": "(threadIdx.x % 32)", "%envreg1": "ptx::grid_barrier_high()", "%envreg2": "ptx::grid_barrier_low()",
    "%lanemask_lt": "((1u << threadIdx.x % 32) - 1)",
    **{f"%{name}.{axis}": "0u" for name in ("tid", "ctaid") for axis in "yz"},
    **{f"%{name}.{axis}": "1u" for name in ("ntid", "nctaid") for axis in "yz"},
}  # fmt: skip
WORDS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_WORDS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # negated
ATOMICS = {"add": "+", "max": ">", "min": "<", "or": "|", "and": "&", "exch": "=", "cas": "?"}
SPACES = ("param", "global", "shared", "local", "const")
LABEL = re.compile(r"\$\w+:")
REGISTER = re.compile(r"%[a-z]+\d+")
KERNEL = re.compile(r"\d([a-z_]+_kernel)(.*)")


def size_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:]) // 8


def unsigned(kind: str) -> str:
    return "u" + kind[1:] if kind[0] in "bs" else kind


def key_of(mangled: str) -> str:
    """What nvcc's and the host compiler's names of one kernel have in common: its name and template arguments."""
    found = KERNEL.search(mangled)
    if found is None:
        raise ValueError(f"a kernel's name must end in _kernel, got {mangled}")
    name, rest = found.groups()
    return name if rest.startswith("E") else name + rest[: rest.index("Ev")]


def split(text: str) -> list[str]:
    """Operands: split at commas outside of all brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text + ","):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            if text[start:i].strip():
                parts.append(text[start:i].strip())
            start = i + 1
    return parts


@dataclass
class Site:
    """One instruction that a planted fault can change."""

    kind: str  # barrier, fence, release, acquire, store, vector, lane
    kernel: str
    where: str


@dataclass
class Function:
    """An entry, or a function that is called: its C++ as it grows."""

    name: str
    key: str
    entry: bool
    sites: list[Site]
    symbols: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> space, value
    declared: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)  # C++, of a function that is called
    threads: int = 1024
    shared: int = 0
    timed: set[str] = field(default_factory=set)  # registers that a load fills
    where: str = ""  # of the source, or the line of PTX
    types: dict[str, str] = field(
        default_factory=dict
    )  # of registers, in C++, by their name or its letters
    floats: bool = False  # whether the instruction has to do with them

    # Values and addresses.

    def register(self, name: str) -> str:
        return "r_" + name[1:].replace(".", "_")

    def value(self, text: str, kind: str) -> str:
        c = C_TYPES[kind]
        if text in SPECIAL:
            return f"({c}){SPECIAL[text]}"
        if text.startswith("%"):
            name = self.register(text)
            known = self.types[re.sub(r"\d+$", "", text) if text not in self.types else text]
            if known == c:
                return name
            return f"ptx::as<{c}>({name})" if {known, c} & {"float", "double"} else f"({c}){name}"
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", text):
            return f"ptx::as<{c}>(std::bit_cast<float>(0x{text[2:]}u))"
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", text):
            return f"ptx::as<{c}>(std::bit_cast<double>(0x{text[2:]}ull))"
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
            number = int(text.rstrip("U"), 0)
            return f"({c}){number % (1 << 64)}ull" if kind != "pred" else str(bool(number)).lower()
        if text in self.symbols:
            return f"({c}){self.symbols[text][1]}"
        raise ValueError(f"{self.key}: unknown value {text}")

    def address(self, text: str, space: str) -> tuple[str, str]:
        """The space, where the symbol knows better than the instruction, and the address as an expression."""
        found = re.fullmatch(r"\[\s*([^\]+\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if found is None:
            raise ValueError(f"{self.key}: unknown address {text}")
        base, offset = found[1], int(found[2] or 0)
        if base in self.symbols:
            space = self.symbols[base][0]
        return space, f"{self.value(base, 'u32' if space == 'shared' else 'u64')} + ({offset})"

    def put(self, register: str, expression: str) -> None:
        name = self.register(register)
        known = self.types[
            re.sub(r"\d+$", "", register) if register not in self.types else register
        ]
        plain = not self.floats and known not in ("float", "double")
        self.code.append(
            f"  {name} = {expression};" if plain else f"  ptx::put({name}, {expression});"
        )

    def site(self, kind: str) -> str:
        self.sites.append(Site(kind, self.key, self.where))
        return f"ptx::planted({len(self.sites) - 1})"

    def here(self) -> str:
        return f't, "{self.where}"'

    # Statements.

    def statement(self, text: str) -> None:
        guard = ""
        if found := re.match(r"@(!?)(%p\d+)\s+(.*)", text):
            guard, text = f"if ({found[1]}{self.register(found[2])}) ", found[3]
            self.wait(found[2])
        head, _, rest = text.replace("\t", " ").partition(" ")
        name, *qualifiers = head.split(".")
        method = getattr(self, "op_" + name, None)
        if method is None or {"rz", "rm", "rp", "ftz", "sat", "approx", "full"} & set(qualifiers):
            raise ValueError(f"{self.key}, {self.where}: unknown instruction {text}")
        operands = split(rest)
        self.floats = bool({"f32", "f64"} & set(qualifiers))
        start = len(self.code)
        if name != "mov" or not all(REGISTER.fullmatch(o) for o in operands):
            self.wait(*(operands if name in ("st", "red", "bra", "call", "bar") else operands[1:]))
        method(qualifiers, operands)
        if guard:
            self.code[start:] = [f"  {guard}{{", *self.code[start:], "  }"]

    def wait(self, *operands: str) -> None:
        """What uses a loaded value waits for it: the count of dependent loads."""
        used = {r for o in operands for r in REGISTER.findall(o)} & self.timed
        self.code += [f"  t.wait(w_{r[1:]});" for r in sorted(used)]

    def op_ret(self, q: list[str], o: list[str]) -> None:
        self.code.append("  return;")

    op_exit = op_ret

    def op_trap(self, q: list[str], o: list[str]) -> None:
        self.code.append(f'  ptx::fail({self.here()}, "trap");')

    def op_bra(self, q: list[str], o: list[str]) -> None:
        self.code.append(f"  goto {o[0].replace('$', '')};")

    def op_call(self, q: list[str], o: list[str]) -> None:
        returned = o[0].strip("()") if o[0].startswith("(") else ""
        target, *rest = o[1:] if returned else o
        given = [a.strip() for a in rest[0].strip("()").split(",") if a.strip()] if rest else []
        values = [f"(char*){self.symbols[a][1]}" for a in ([returned] if returned else []) + given]
        self.code.append(f"  {function_name(target)}({', '.join(['t', *values])});")

    def op_bar(self, q: list[str], o: list[str]) -> None:
        if q[:2] == ["warp", "sync"]:
            self.code.append(
                f"  if (!{self.site('barrier')}) ptx::warp_barrier(t, {self.value(o[0], 'u32')});"
            )
        elif "red" in q:
            if q[-2:] != ["or", "pred"]:
                raise ValueError(f"{self.key}: unknown barrier {q}")
            self.put(o[0], f"ptx::any_in_block(t, {self.value(o[-1], 'pred')})")
        elif o[0] != "0" or len(o) > 1:
            raise ValueError(f"{self.key}: a barrier must be of the whole block, got {o}")
        else:
            self.code.append(f"  if (!{self.site('barrier')}) ptx::block_barrier(t);")

    op_barrier = op_bar

    def op_membar(self, q: list[str], o: list[str]) -> None:
        if "cta" not in q:
            self.code.append(f"  if (!{self.site('fence')}) ptx::fence(t);")

    op_fence = op_membar

    def op_nanosleep(self, q: list[str], o: list[str]) -> None:
        self.code.append("  ptx::pause();")

    def op_mov(self, q: list[str], o: list[str]) -> None:
        kind = q[-1]
        half = f"b{int(kind[1:]) // 2}" if kind != "pred" else kind
        shift = int(kind[1:]) // 2 if kind != "pred" else 0
        if o[1].startswith("{"):
            low, high = split(o[1][1:-1])
            wide = C_TYPES[unsigned(kind)]
            self.put(
                o[0],
                f"({wide})({wide})({self.value(low, half)}) | ({wide})({self.value(high, half)}) << {shift}",
            )
        elif o[0].startswith("{"):
            low, high = split(o[0][1:-1])
            self.code.append(f"  {{ const auto v = {self.value(o[1], unsigned(kind))};")
            if low != "_":
                self.put(low, f"({C_TYPES[half]})v")
            if high != "_":
                self.put(high, f"({C_TYPES[half]})(v >> {shift})")
            self.code.append("  }")
        else:
            self.put(o[0], self.value(o[1], kind))
            if o[0] in self.timed:
                known = f"w_{o[1][1:]}" if o[1] in self.timed else "0"
                self.code.append(f"  w_{o[0][1:]} = {known};")

    def op_cvta(self, q: list[str], o: list[str]) -> None:
        if "shared" in q:
            raise ValueError(
                f"{self.key}: shared memory must be addressed as such, not through a generic pointer"
            )
        self.put(o[0], self.value(o[1], "u64"))

    # Memory.

    def op_ld(self, q: list[str], o: list[str]) -> None:
        kind, count = q[-1], next((int(x[1]) for x in q if x in ("v2", "v4")), 1)
        space, at = self.address(o[1], next((x for x in q if x in SPACES), "generic"))
        targets = split(o[0].strip("{}"))
        size, c = size_of(kind), C_TYPES[kind]
        strong = bool({"acquire", "volatile", "relaxed"} & set(q))
        self.code.append(f"  {{ auto at = {at};")
        if space in ("param", "local", "const"):
            load = "ptx::plain<{c}>(at + {i})"
        elif space == "shared":
            load = f"ptx::load_shared<{{c}}>({self.here()}, at + {{i}})"
        elif strong:
            weak = f"!{self.site('acquire')}" if "acquire" in q else "false"
            load = f"ptx::load_strong<{{c}}>({self.here()}, at + {{i}}, {weak})"
        else:
            load = f"ptx::load<{{c}}>({self.here()}, at + {{i}})"
        self.align(size * count, count, space)
        for i, target in enumerate(targets):
            if target == "_":
                continue
            self.put(target, load.format(c=c, i=i * size))
            if target in self.timed:
                # Whoever polls a word waits as long as for what it was told, however often it asks.
                counts = space in ("global", "generic") and not strong
                self.code.append(f"  w_{target[1:]} = {'t.loaded()' if counts else 't.now'};")
        self.code.append("  }")

    op_ldu = op_ld

    def op_st(self, q: list[str], o: list[str]) -> None:
        kind, count = q[-1], next((int(x[1]) for x in q if x in ("v2", "v4")), 1)
        space, at = self.address(o[0], next((x for x in q if x in SPACES), "generic"))
        size, c = size_of(kind), C_TYPES[kind]
        plain = space in ("param", "local")
        guard = "" if plain else f"if (!{self.site('store')}) "
        self.code.append(f"  {guard}{{ auto at = {at};")
        self.align(size * count, count, space)
        for i, source in enumerate(split(o[1].strip("{}"))):
            value = self.value(source, kind)
            if plain:
                self.code.append(f"  ptx::set_plain<{c}>(at + {i * size}, {value});")
            elif space == "shared":
                self.code.append(
                    f"  ptx::store_shared<{c}>({self.here()}, at + {i * size}, {value});"
                )
            else:
                release = "true" if "release" in q else "false"
                strong = "true" if {"release", "relaxed", "volatile"} & set(q) else "false"
                self.code.append(
                    f"  ptx::store<{c}>({self.here()}, at + {i * size}, {value}, {strong}, {release});"
                )
        self.code.append("  }")

    def align(self, size: int, count: int, space: str) -> None:
        if space in ("param", "local", "const"):
            return
        if count > 1:
            self.code.append(
                f"  ptx::check_vector<{size}>({self.here()}, at, {self.site('vector')});"
            )
        else:
            self.code.append(f"  ptx::check_aligned<{size}>({self.here()}, at);")

    def op_atom(self, q: list[str], o: list[str], returns: bool = True) -> None:
        kind = unsigned(q[-1]) if "add" in q or "exch" in q else q[-1]
        what = next(x for x in q if x in ATOMICS)
        space, at = self.address(o[1] if returns else o[0], "shared" if "shared" in q else "global")
        values = ", ".join(self.value(v, kind) for v in (o[2:] if returns else o[1:]))
        c, size = C_TYPES[kind], size_of(kind)
        self.code.append(f"  {{ auto at = {at}; ptx::check_aligned<{size}>({self.here()}, at);")
        if space == "shared":
            result = f"ptx::atomic_shared<{c}, '{ATOMICS[what]}'>({self.here()}, at, {values})"
        else:
            release = f"!{self.site('release')}" if {"release", "acq_rel"} & set(q) else "false"
            acquire = "true" if {"acquire", "acq_rel"} & set(q) else "false"
            result = f"ptx::atomic<{c}, '{ATOMICS[what]}'>({self.here()}, at, {release}, {acquire}, {values})"
        if returns and o[0] != "_":
            self.put(o[0], result)
            if o[0] in self.timed:
                self.code.append(f"  w_{o[0][1:]} = {'t.loaded()' if space == 'global' else '0'};")
        else:
            self.code.append(f"  {result};")
        self.code.append("  }")

    def op_red(self, q: list[str], o: list[str]) -> None:
        self.op_atom(q, o, returns=False)

    # Arithmetic.

    def op_cvt(self, q: list[str], o: list[str]) -> None:
        to, source = (x for x in q if x in C_TYPES)
        value = self.value(o[1], source)
        if source[0] == "f" and to[0] in "us":
            mode = next((x for x in q if x in ("rni", "rzi", "rmi", "rpi")), "")
            value = f"ptx::to_integer<{C_TYPES[to]}>({value}, '{mode[1]}')"
        elif to[0] == "f" and not {"rn"} & set(q) and size_of(source) > size_of(to):
            raise ValueError(f"{self.key}: unknown rounding {q}")
        self.put(o[0], f"({C_TYPES[to]}){value}")

    def op_setp(self, q: list[str], o: list[str]) -> None:
        kind, word = q[-1], q[0]
        if len(q) > 2 and q[1] in ("and", "or", "xor"):
            raise ValueError(f"{self.key}: unknown comparison {q}")
        kind = unsigned(kind) if kind[0] == "b" or word in UNSIGNED_WORDS else kind
        a, b = self.value(o[1], kind), self.value(o[2], kind)
        if word in UNORDERED:
            self.put(o[0], f"!({a} {UNORDERED[word]} {b})")
        elif word == "nan":
            self.put(o[0], f"std::isnan({a}) || std::isnan({b})")
        else:
            self.put(o[0], f"{a} {(WORDS | UNSIGNED_WORDS)[word]} {b}")

    def op_selp(self, q: list[str], o: list[str]) -> None:
        self.put(
            o[0], f"{self.register(o[3])} ? {self.value(o[1], q[-1])} : {self.value(o[2], q[-1])}"
        )

    def binary(self, sign: str, q: list[str], o: list[str], kind: str) -> None:
        self.put(
            o[0], f"({C_TYPES[kind]})({self.value(o[1], kind)} {sign} {self.value(o[2], kind)})"
        )

    def op_and(self, q: list[str], o: list[str]) -> None:
        self.binary("&", q, o, q[-1])

    def op_or(self, q: list[str], o: list[str]) -> None:
        self.binary("|", q, o, q[-1])

    def op_xor(self, q: list[str], o: list[str]) -> None:
        self.binary("^", q, o, q[-1])

    def op_not(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"{'!' if q[-1] == 'pred' else '~'}{self.value(o[1], q[-1])}")

    def op_neg(self, q: list[str], o: list[str]) -> None:
        kind = unsigned(q[-1])
        self.put(o[0], f"({C_TYPES[kind]})(-{self.value(o[1], kind)})")

    def op_abs(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"std::abs({self.value(o[1], q[-1])})")

    def op_add(self, q: list[str], o: list[str]) -> None:
        self.with_carry("+", q, o)

    op_addc = op_add

    def op_sub(self, q: list[str], o: list[str]) -> None:
        self.with_carry("-", q, o)

    op_subc = op_sub

    def with_carry(self, sign: str, q: list[str], o: list[str]) -> None:
        raise NotImplementedError  # replaced below, where the instruction's own name is known

    def op_mul(self, q: list[str], o: list[str]) -> None:
        self.product(q, o, "")

    def op_mad(self, q: list[str], o: list[str]) -> None:
        self.product(q, o, o[3])

    def product(self, q: list[str], o: list[str], term: str) -> None:
        kind = q[-1]
        if "wide" in q:
            wide = f"{kind[0]}{2 * int(kind[1:])}"
            product = f"({C_TYPES[wide]}){self.value(o[1], kind)} * ({C_TYPES[wide]}){self.value(o[2], kind)}"
            kind = wide
        elif "hi" in q:
            big = {
                "u32": "uint64_t",
                "s32": "int64_t",
                "u64": "unsigned __int128",
                "s64": "__int128",
            }[kind]
            product = (
                f"(({big}){self.value(o[1], kind)} * ({big}){self.value(o[2], kind)}) >> {kind[1:]}"
            )
        elif "lo" in q:
            kind = unsigned(kind)
            product = f"(uint64_t){self.value(o[1], kind)} * (uint64_t){self.value(o[2], kind)}"
        else:
            product = f"{self.value(o[1], kind)} * {self.value(o[2], kind)}"
        c = C_TYPES[unsigned(kind)]
        self.put(
            o[0],
            f"({c})(({c})({product}) + {self.value(term, unsigned(kind))})"
            if term
            else f"({c})({product})",
        )

    def op_div(self, q: list[str], o: list[str]) -> None:
        if q[-1][0] == "f" and "rn" not in q:
            raise ValueError(f"{self.key}: unknown rounding {q}")
        self.binary("/", q, o, q[-1])

    def op_rem(self, q: list[str], o: list[str]) -> None:
        self.binary("%", q, o, q[-1])

    def op_fma(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"std::fma({', '.join(self.value(x, q[-1]) for x in o[1:])})")

    def op_sqrt(self, q: list[str], o: list[str]) -> None:
        if "rn" not in q:
            raise ValueError(f"{self.key}: unknown rounding {q}")
        self.put(o[0], f"std::sqrt({self.value(o[1], q[-1])})")

    def op_min(self, q: list[str], o: list[str]) -> None:
        self.put(
            o[0],
            f"std::min<{C_TYPES[q[-1]]}>({self.value(o[1], q[-1])}, {self.value(o[2], q[-1])})",
        )

    def op_max(self, q: list[str], o: list[str]) -> None:
        self.put(
            o[0],
            f"std::max<{C_TYPES[q[-1]]}>({self.value(o[1], q[-1])}, {self.value(o[2], q[-1])})",
        )

    def op_shl(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"ptx::shift_left<{C_TYPES[unsigned(q[-1])]}>({self.value(o[1], unsigned(q[-1]))}, {self.value(o[2], 'u32')})")  # fmt: skip

    def op_shr(self, q: list[str], o: list[str]) -> None:
        kind = unsigned(q[-1]) if q[-1][0] == "b" else q[-1]
        self.put(
            o[0],
            f"ptx::shift_right<{C_TYPES[kind]}>({self.value(o[1], kind)}, {self.value(o[2], 'u32')})",
        )

    def op_shf(self, q: list[str], o: list[str]) -> None:
        values = ", ".join(self.value(x, "u32") for x in o[1:])
        self.put(o[0], f'ptx::funnel("{q[0]}{"w" if "wrap" in q else "c"}", {values})')

    def op_bfe(self, q: list[str], o: list[str]) -> None:
        if q[-1][0] != "u":
            raise ValueError(f"{self.key}: unknown field {q}")
        self.put(o[0], f"ptx::field<{C_TYPES[q[-1]]}>({self.value(o[1], q[-1])}, {self.value(o[2], 'u32')}, {self.value(o[3], 'u32')})")  # fmt: skip

    def op_bfi(self, q: list[str], o: list[str]) -> None:
        c = C_TYPES[q[-1]]
        self.put(o[0], f"ptx::insert<{c}>({self.value(o[1], q[-1])}, {self.value(o[2], q[-1])}, {self.value(o[3], 'u32')}, {self.value(o[4], 'u32')})")  # fmt: skip

    def op_prmt(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"ptx::permute({', '.join(self.value(x, 'u32') for x in o[1:])})")

    def op_clz(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"(uint32_t)std::countl_zero({self.value(o[1], unsigned(q[-1]))})")

    def op_popc(self, q: list[str], o: list[str]) -> None:
        self.put(o[0], f"(uint32_t)std::popcount({self.value(o[1], unsigned(q[-1]))})")

    def op_brev(self, q: list[str], o: list[str]) -> None:
        self.put(
            o[0], f"ptx::reverse<{C_TYPES[unsigned(q[-1])]}>({self.value(o[1], unsigned(q[-1]))})"
        )

    def op_bfind(self, q: list[str], o: list[str]) -> None:
        kind, shift = unsigned(q[-1]), "shiftamt" in q
        value = f"(uint32_t)std::countl_zero({self.value(o[1], kind)})"
        bits = int(kind[1:])
        self.put(o[0], f"ptx::find({value}, {bits}, {str(shift).lower()})")

    # Warps.

    def op_shfl(self, q: list[str], o: list[str]) -> None:
        target, _, found = o[0].partition("|")
        values = ", ".join(self.value(x, "u32") for x in o[1:4])
        self.code.append(
            f"  {{ bool ok; const uint32_t got = ptx::shuffle<'{q[1][0]}'>(t, {values}, ok, {self.site('lane')});"
        )
        self.put(target.strip(), "got")
        if found:
            self.put(found.strip(), "ok")
        self.code.append("  }")

    def op_redux(self, q: list[str], o: list[str]) -> None:
        what = next(x for x in q if x in ("add", "min", "max", "or", "and"))
        self.put(
            o[0],
            f"ptx::reduce<{C_TYPES[unsigned(q[-1])]}>(t, '{what[1]}', {self.value(o[1], unsigned(q[-1]))})",
        )

    def op_vote(self, q: list[str], o: list[str]) -> None:
        negated = o[1].startswith("!")
        value = ("!" if negated else "") + self.value(o[1].lstrip("!"), "pred")
        self.put(o[0], f"ptx::vote<'{q[1][1]}'>(t, {value})")

    def op_match(self, q: list[str], o: list[str]) -> None:
        if q[0] != "any":
            raise ValueError(f"{self.key}: unknown match {q}")
        self.put(o[0], f"ptx::match_any(t, {self.value(o[1], 'u32')})")

    def op_activemask(self, q: list[str], o: list[str]) -> None:
        raise ValueError(f"{self.key}: which lanes are active is not for a kernel to ask")


def _carrying(name: str, sign: str):
    def op(self: Function, q: list[str], o: list[str]) -> None:
        kind = unsigned(q[-1])
        a, b, c = self.value(o[1], kind), self.value(o[2], kind), C_TYPES[kind]
        takes, gives = name.endswith("c"), "cc" in q
        if takes or gives:
            call = "ptx::add" if sign == "+" else "ptx::subtract"
            given = "carry" if takes else "false"
            self.put(o[0], f"{call}<{c}>({a}, {b}, {given}, {'&carry' if gives else 'nullptr'})")
        else:
            self.put(o[0], f"({c})({a} {sign} {b})")

    return op


for _name, _sign in (("add", "+"), ("addc", "+"), ("sub", "-"), ("subc", "-")):
    setattr(Function, f"op_{_name}", _carrying(_name, _sign))


def function_name(mangled: str) -> str:
    return "f_" + re.sub(r"\W", "_", mangled)


def statements(lines: Iterable[str]) -> Iterable[str]:
    """A body's statements, labels and braces, one at a time."""
    for line in lines:
        rest = line.strip()
        while rest:
            if rest[0] in "{}":
                yield rest[0]
                rest = rest[1:].strip()
            elif LABEL.match(rest):
                yield rest
                rest = ""
            elif rest.startswith((".loc", ".pragma", ".file")):
                yield rest.rstrip(";")
                rest = ""
            else:
                text, end, rest = rest.partition(";")
                if not end:
                    raise ValueError(f"a statement must end on its line, got {text}")
                yield text.strip()
                rest = rest.strip()


class Module:
    """The functions of one file of PTX."""

    def __init__(self, path: Path, sites: list[Site]):
        self.functions: list[Function] = []
        self.globals: dict[str, tuple[str, str]] = {}
        self.static: list[
            tuple[str, int, int]
        ] = []  # shared memory of the module: name, alignment, bytes
        self.data: list[str] = []
        self.files: dict[str, str] = {}
        self.sites = sites
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        lines = [re.sub(r"\s+", " ", line.split("//")[0]).strip() for line in text.split("\n")]
        for line in lines:
            if found := re.match(r'\s*\.file\s+(\d+)\s+"([^"]+)"', line):
                self.files[found[1]] = Path(found[2]).name
        i = 0
        while i < len(lines):
            i = self.item(lines, i)

    def item(self, lines: list[str], i: int) -> int:
        line = lines[i].strip()
        if found := re.match(r"(?:\.visible |\.weak )?\.(entry|func)\b", line):
            end = i
            while lines[end].strip() not in ("{", ";") and not lines[end].endswith(";"):
                end += 1
            head = " ".join(part.strip() for part in lines[i:end])
            if lines[end].strip() != "{":  # a declaration
                return end + 1
            stop, depth = end, 0
            while depth or stop == end:
                depth += lines[stop].count("{") - lines[stop].count("}")
                stop += 1
            stop -= 1
            self.functions.append(self.function(head, found[1] == "entry", lines[end + 1 : stop]))
            return stop + 1
        if found := re.match(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", line):
            if found[3]:
                self.static.append((found[2], int(found[1]), int(found[3])))
            else:
                self.globals[found[2]] = ("shared", "t.dynamic")
        elif found := re.match(
            r"\.(?:global|const) .*?\.align (\d+) \.b8 (\w+)\[(\d+)\](?: = \{(.*)\})?;", line
        ):
            name = f"g_{len(self.data)}"
            self.data.append(
                f"alignas({found[1]}) unsigned char {name}[{found[3]}] = {{{found[4] or ''}}};"
            )
            self.globals[found[2]] = ("const", f"(uint64_t){name}")
        elif line.startswith((".global", ".const", ".shared")):
            raise ValueError(f"unknown memory {line}")
        return i + 1

    def function(self, head: str, entry: bool, body: list[str]) -> Function:
        parts = re.match(
            r".*?\.(?:entry|func)\s*(\([^)]*\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?(.*)", head
        )
        if parts is None:
            raise ValueError(f"unknown head {head}")
        returned, name, given, directives = parts.groups()
        f = Function(name, key_of(name) if entry else name, entry, self.sites, dict(self.globals))
        if found := re.search(r"\.maxntid (\d+)", directives or ""):
            f.threads = int(found[1])
        offset = 0
        for text in split(given or ""):
            found = re.match(
                r"\.param\s+(?:\.align (\d+) )?\.(\w+)\s+(?:\.ptr.*?\s)?(\w+)(?:\[(\d+)\])?$", text
            )
            if found is None:
                raise ValueError(f"{f.key}: unknown parameter {text}")
            size = size_of(found[2]) * int(found[4] or 1)
            if entry:
                alignment = int(found[1] or size_of(found[2]))
                offset = -(-offset // alignment) * alignment
                f.symbols[found[3]] = ("param", f"(uint64_t)(param + {offset})")
                offset += size
            else:
                f.symbols[found[3]] = ("param", f"(uint64_t){found[3]}")
                f.parameters.append(f"char* {found[3]}")
        if returned:
            result = split(returned[1:-1])[0].split()[-1].split("[")[0]
            f.symbols[result] = ("param", f"(uint64_t){result}")
            f.parameters.insert(0, f"char* {result}")
        for symbol, alignment, size in self.static:
            f.shared = -(-f.shared // alignment) * alignment
            f.symbols[symbol] = ("shared", f"{f.shared}u")
            f.shared += size
        every = list(statements(body))
        f.timed = loaded_registers(every)
        for number, text in enumerate(every):
            self.statement(f, text, number)
        f.declared += [f"  uint32_t w_{r[1:]} = 0;" for r in sorted(f.timed)]
        return f

    def statement(self, f: Function, text: str, number: int) -> None:
        f.where = f.where or f"statement {number}"
        if text in "{}":
            f.code.append("  " + text)
        elif LABEL.fullmatch(text):
            f.code.append(f"{text[1:]} ;")
        elif found := re.match(r"\.loc\s+(\d+)\s+(\d+)", text):
            f.where = f"{self.files.get(found[1], '?')}:{found[2]}"
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
            c = C_TYPES[unsigned(found[1])]
            for name in split(found[2]):
                many = re.fullmatch(r"(%\w+)<(\d+)>", name)
                f.types[many[1] if many else name] = c
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
                if many is None:
                    f.code.append(f"  {c} {f.register(name)};")
                elif names:
                    f.declared.append(f"  {c} " + ", ".join(map(f.register, names)) + ";")
        elif found := re.match(r"\.shared \.align (\d+) \.(\w+) (\w+)(?:\[(\d+)\])?", text):
            f.shared = -(-f.shared // int(found[1])) * int(found[1])
            f.symbols[found[3]] = ("shared", f"{f.shared}u")
            f.shared += size_of(found[2]) * int(found[4] or 1)
        elif found := re.match(
            r"\.(local|param)\s+(?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?", text
        ):
            name = f"m_{len(f.declared)}_{len(f.code)}"
            size = size_of(found[3]) * int(found[5] or 1)
            f.declared.append(f"  alignas(16) char {name}[{size}];")
            f.symbols[found[4]] = (found[1], f"(uint64_t){name}")
        elif not text.startswith(".pragma"):
            f.statement(text)

    def source(self) -> str:
        heads = [f"static void {function_name(f.name)}({', '.join(['ptx::Thread& t', *f.parameters])});" for f in self.functions if not f.entry]  # fmt: skip
        return "\n".join(
            ['#include "ptx.h"', *self.data, *heads, *map(source_of, self.functions), ""]
        )


def source_of(f: Function) -> str:
    head = (
        f"void {function_name(f.name)}(ptx::Thread& t, const char* param)"
        if f.entry
        else f"static void {function_name(f.name)}({', '.join(['ptx::Thread& t', *f.parameters])})"
    )
    start = "  (void)t; bool carry = false; (void)carry;" + (" (void)param;" if f.entry else "")
    return "\n".join([f"{head} {{", start, *f.declared, *f.code, "}"])


def loaded_registers(every: list[str]) -> set[str]:
    """Registers that a load from global memory or an atomic fills, and those that are copies of one."""
    loaded: set[str] = set()
    copies: list[tuple[str, str]] = []
    for text in every:
        text = re.sub(r"^@!?%p\d+\s+", "", text).replace("\t", " ")
        head, _, rest = text.partition(" ")
        if head.startswith(
            (
                "ld.global",
                "ld.b",
                "ld.u",
                "ld.s",
                "ld.f",
                "ld.v",
                "ld.acquire",
                "ld.relaxed",
                "atom.",
            )
        ):
            loaded.update(REGISTER.findall(split(rest)[0]))
        elif (
            head.startswith("mov.")
            and (o := split(rest))
            and REGISTER.fullmatch(o[0])
            and REGISTER.fullmatch(o[1])
        ):
            copies.append((o[0], o[1]))
    grown = True
    while grown:
        new = {to for to, source in copies if source in loaded} - loaded
        loaded |= new
        grown = bool(new)
    return loaded


def translate(paths: Iterable[Path], folder: Path) -> tuple[list[Path], list[Site]]:
    """Write a C++ file for each file of PTX, and one with the tables; return them, and all sites."""
    sites: list[Site] = []
    written, rows, heads = [], [], []
    for path in paths:
        module = Module(path, sites)
        written.append(folder / f"ptx_{path.stem}.cpp")
        written[-1].write_text(module.source())
        for f in module.functions:
            if f.entry:
                name = function_name(f.name)
                heads.append(f"void {name}(ptx::Thread&, const char*);")
                rows.append(f'  {{"{f.key}", {name}, {-(-f.shared // 16) * 16}, {f.threads}}},')
    table = folder / "ptx_table.cpp"
    table.write_text(
        "\n".join(
            ['#include "ptx.h"', *heads, "namespace ptx {", "const Entry entries[] = {", *rows,
             "  {nullptr, nullptr, 0, 0}};", f"char sites_seen[{len(sites) + 1}] = {{}};", "}", ""]
        )
    )  # fmt: skip
    return [*written, table], sites
