"""Every instruction against plain Python arithmetic, one element at a time, on random and on awkward inputs.

A generated file holds one kernel per entry of the table, whose body is the instruction as inline assembly."""

import math
import struct

import numpy as np
import pytest
from ptxsim import Device, Library
from ptxsim.values import bf16_to_f32, f32_to_bf16

N = 256
C_TYPES = {
    "u16": ("unsigned short", "h"), "u32": ("unsigned", "r"), "s32": ("int", "r"), "s64": ("long long", "l"),
    "u64": ("unsigned long long", "l"), "f32": ("float", "f"), "f64": ("double", "d"), "f16": ("unsigned short", "h"),
    "bf16": ("unsigned short", "h"), "f16x2": ("unsigned", "r"), "bf16x2": ("unsigned", "r"),
}  # fmt: skip
DTYPES = {"u16": np.uint16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "f32": np.float32,
          "f64": np.float64, "f16": np.uint16, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32}  # fmt: skip
M32, M64 = (1 << 32) - 1, (1 << 64) - 1


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def f32(x) -> float:
    """Rounded to float32, kept as a Python float."""
    return float(np.float32(x))


def halves(word: int, kind: str) -> tuple[float, float]:
    raw = np.array([word & 0xFFFF, word >> 16], np.uint16)
    values = raw.view(np.float16) if kind == "f16" else bf16_to_f32(raw)
    return tuple(float(value) for value in values)


def pair(values, kind: str) -> int:
    raw = np.float32(values).astype(np.float16).view(np.uint16) if kind == "f16" else f32_to_bf16(np.float32(values))
    return int(raw[0]) | int(raw[1]) << 16


def half(x: float) -> int:
    return pair([x, 0], "f16") & 0xFFFF if x == x else 0x7FFF


def truncated_division(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def lop3(a, b, c, table):
    return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i for i in range(32))


def prmt(a, b, selector):
    octets = (a | b << 32).to_bytes(8, "little")
    chosen = [(octets[selector >> 4 * i & 7], selector >> 4 * i & 8) for i in range(4)]
    return int.from_bytes(bytes((0xFF if octet & 0x80 else 0) if sign else octet for octet, sign in chosen), "little")


def bfe(a, position, length, bits, is_signed):
    position, length = position & 255, length & 255
    value = signed(a, bits) if is_signed else a
    field = (value >> min(position, bits)) & ((1 << length) - 1)
    if is_signed and length:
        at = min(position + length - 1, bits - 1)
        if a >> at & 1:
            field |= -1 << length
    return field & ((1 << bits) - 1)


def bfi(a, b, position, length):
    position, length = position & 255, length & 255
    mask = ((1 << length) - 1) << position & M32
    return (b & ~mask) | (a << position & mask)


def to_integer(x, rounding, bits, is_signed):
    if math.isnan(x):
        return 0 if bits < 64 else 1 << 63
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if is_signed else (0, (1 << bits) - 1)
    if math.isinf(x):
        return high if x > 0 else low
    return max(low, min(high, rounding(x)))


def directed(exact, mode):
    """A Python float to float32, rounded down (rm), up (rp) or to zero (rz)."""
    nearest = np.float32(exact)
    if mode == "rz":
        mode = "rm" if exact > 0 else "rp"
    if mode == "rm" and float(nearest) > exact:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    if mode == "rp" and float(nearest) < exact:
        nearest = np.nextafter(nearest, np.float32(np.inf))
    return float(nearest)


def tf32_rna(x: float) -> int:
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    return (word + 0x1000) & 0xFFFFE000 if word & 0x7F800000 != 0x7F800000 else word & 0xFFFFE000


def pmin(a, b):
    return b if math.isnan(a) else a if math.isnan(b) else min(a, b)


def ftz(x):
    return math.copysign(0, x) if abs(x) < 2.0**-126 else x


def predicate(text):
    return f"{{.reg .pred p; {text}; selp.u32 %0, 1, 0, p;}}"


# name: (assembly, destination type, source types, expected)
INTEGER = {
    "add.u32": ("add.u32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a + b),
    "sub.s64": ("sub.s64 %0, %1, %2;", "s64", "s64 s64", lambda a, b: a - b),
    "add.s16": ("add.s16 %0, %1, %2;", "u16", "u16 u16", lambda a, b: a + b),
    "mul.lo.s32": ("mul.lo.s32 %0, %1, %2;", "s32", "s32 s32", lambda a, b: a * b),
    "mul.hi.s32": ("mul.hi.s32 %0, %1, %2;", "s32", "s32 s32", lambda a, b: a * b >> 32),
    "mul.hi.u32": ("mul.hi.u32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a * b >> 32),
    "mul.hi.u64": ("mul.hi.u64 %0, %1, %2;", "u64", "u64 u64", lambda a, b: a * b >> 64),
    "mul.hi.s64": ("mul.hi.s64 %0, %1, %2;", "s64", "s64 s64", lambda a, b: a * b >> 64),
    "mul.wide.s32": ("mul.wide.s32 %0, %1, %2;", "s64", "s32 s32", lambda a, b: a * b),
    "mul.wide.u16": ("mul.wide.u16 %0, %1, %2;", "u32", "u16 u16", lambda a, b: a * b),
    "mad.lo.s32": ("mad.lo.s32 %0, %1, %2, %3;", "s32", "s32 s32 s32", lambda a, b, c: a * b + c),
    "mad.hi.u32": ("mad.hi.u32 %0, %1, %2, %3;", "u32", "u32 u32 u32", lambda a, b, c: (a * b >> 32) + c),
    "mad.wide.u32": ("mad.wide.u32 %0, %1, %2, %3;", "u64", "u32 u32 u64", lambda a, b, c: a * b + c),
    "div.s32": ("div.s32 %0, %1, %2;", "s32", "s32 s32", truncated_division),
    "div.u64": ("div.u64 %0, %1, %2;", "u64", "u64 u64", lambda a, b: a // b if b else M64),
    "rem.s32": ("rem.s32 %0, %1, %2;", "s32", "s32 s32", lambda a, b: a - truncated_division(a, b) * b if b else a),
    "rem.u32": ("rem.u32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a % b if b else a),
    "min.s32": ("min.s32 %0, %1, %2;", "s32", "s32 s32", min),
    "max.u64": ("max.u64 %0, %1, %2;", "u64", "u64 u64", max),
    "abs.s32": ("abs.s32 %0, %1;", "s32", "s32", abs),
    "neg.s64": ("neg.s64 %0, %1;", "s64", "s64", lambda a: -a),
    "sad.s32": ("sad.s32 %0, %1, %2, %3;", "s32", "s32 s32 s32", lambda a, b, c: c + abs(a - b)),
    "add.sat.s32": ("add.sat.s32 %0, %1, %2;", "s32", "s32 s32",
            lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b))),
    "and.b32": ("and.b32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a & b),
    "xor.b64": ("xor.b64 %0, %1, %2;", "u64", "u64 u64", lambda a, b: a ^ b),
    "not.b32": ("not.b32 %0, %1;", "u32", "u32", lambda a: ~a),
    "shl.b32": ("shl.b32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a << min(b, 32)),
    "shl.b64": ("shl.b64 %0, %1, %2;", "u64", "u64 u32", lambda a, b: a << min(b, 64)),
    "shr.u32": ("shr.u32 %0, %1, %2;", "u32", "u32 u32", lambda a, b: a >> min(b, 32)),
    "shr.s32": ("shr.s32 %0, %1, %2;", "s32", "s32 u32", lambda a, b: a >> min(b, 32)),
    "shr.u16": ("shr.u16 %0, %1, %2;", "u16", "u16 u32", lambda a, b: a >> min(b, 16)),
    "shf.l.wrap": ("shf.l.wrap.b32 %0, %1, %2, %3;", "u32", "u32 u32 u32",
            lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    "shf.r.wrap": ("shf.r.wrap.b32 %0, %1, %2, %3;", "u32", "u32 u32 u32", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf.l.clamp": ("shf.l.clamp.b32 %0, %1, %2, %3;", "u32", "u32 u32 u32",
            lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32),
    "shf.r.clamp": ("shf.r.clamp.b32 %0, %1, %2, %3;", "u32", "u32 u32 u32",
            lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "bfe.u32": ("bfe.u32 %0, %1, %2, %3;", "u32", "u32 u32 u32", lambda a, b, c: bfe(a, b, c, 32, False)),
    "bfe.s32": ("bfe.s32 %0, %1, %2, %3;", "u32", "u32 u32 u32", lambda a, b, c: bfe(a, b, c, 32, True)),
    "bfi.b32": ("bfi.b32 %0, %1, %2, %3, %3;", "u32", "u32 u32 u32", lambda a, b, c: bfi(a, b, c, c)),
    "prmt.b32": ("prmt.b32 %0, %1, %2, %3;", "u32", "u32 u32 u32", prmt),
    "lop3.b32": ("lop3.b32 %0, %1, %2, %3, 0x6a;", "u32", "u32 u32 u32", lambda a, b, c: lop3(a, b, c, 0x6A)),
    "popc.b64": ("popc.b64 %0, %1;", "u32", "u64", lambda a: a.bit_count()),
    "clz.b32": ("clz.b32 %0, %1;", "u32", "u32", lambda a: 32 - a.bit_length()),
    "clz.b64": ("clz.b64 %0, %1;", "u32", "u64", lambda a: 64 - a.bit_length()),
    "bfind.u32": ("bfind.u32 %0, %1;", "u32", "u32", lambda a: a.bit_length() - 1),
    "bfind.s32": ("bfind.s32 %0, %1;", "u32", "s32", lambda a: (a if a >= 0 else ~a).bit_length() - 1),
    "bfind.shiftamt.u32": ("bfind.shiftamt.u32 %0, %1;", "u32", "u32", lambda a: 32 - a.bit_length() if a else -1),
    "brev.b32": ("brev.b32 %0, %1;", "u32", "u32", lambda a: int(f"{a:032b}"[::-1], 2)),
    "selp": ("{.reg .pred p; setp.lt.s32 p, %1, %2; selp.s32 %0, %1, %2, p;}", "s32", "s32 s32", min),
    "slct": ("slct.u32.s32 %0, %1, %2, %3;", "u32", "u32 u32 s32", lambda a, b, c: a if c >= 0 else b),
    "setp.hi.and": (predicate("setp.lo.u32 p, %3, 77; setp.hi.and.u32 p, %1, %2, p"), "u32", "u32 u32 u32",
                    lambda a, b, c: a > b and c < 77),
    "setp two": ("{.reg .pred p, q; setp.ge.s32 p|q, %1, %2; selp.u32 %0, 1, 0, q;}", "u32", "s32 s32",
            lambda a, b: a < b),
    "set.lt": ("set.lt.u32.s32 %0, %1, %2;", "u32", "s32 s32", lambda a, b: M32 if a < b else 0),
    "cvt.s64.s32": ("cvt.s64.s32 %0, %1;", "s64", "s32", lambda a: a),
    "cvt.u64.u32": ("cvt.u64.u32 %0, %1;", "u64", "u32", lambda a: a),
    "cvt.u32.u64": ("cvt.u32.u64 %0, %1;", "u32", "u64", lambda a: a),
    "cvt.s32.s8": ("cvt.s32.s8 %0, %1;", "s32", "s32", lambda a: signed(a, 8)),
    "cvt.u16.u32": ("cvt.u16.u32 %0, %1;", "u16", "u32", lambda a: a),
    "cvt.u32.u8": ("cvt.u32.u8 %0, %1;", "u32", "u32", lambda a: a & 255),
    "cvt.sat.u8.s32": ("cvt.sat.u8.s32 %0, %1;", "u32", "s32", lambda a: max(0, min(255, a))),
    "mov pack": ("mov.b64 %0, {%1, %2};", "u64", "u32 u32", lambda a, b: a | b << 32),
    "mov unpack": ("{.reg .b32 low; mov.b64 {low, %0}, %1;}", "u32", "u64", lambda a: a >> 32),
    "mov 16": ("{.reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, low};}", "u32", "u32",
               lambda a: a >> 16 | a << 16),
    "negated predicate": ("{.reg .pred p; setp.eq.u32 p, %1, %2; mov.u32 %0, 5; @!p mov.u32 %0, 7;}", "u32", "u32 u32",
                          lambda a, b: 5 if a == b else 7),
    "labels": ("{.reg .pred p; mov.u32 %0, %1; setp.gt.u32 p, %1, %2; @p bra DONE; add.u32 %0, %0, 1;"
               " DONE: add.u32 %0, %0, 2;}", "u32", "u32 u32", lambda a, b: a + (2 if a > b else 3)),
}  # fmt: skip
FLOAT = {
    "add.f32": ("add.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: a + b),
    "sub.ftz.f32": ("sub.ftz.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: ftz(f32(ftz(a) - ftz(b)))),
    "mul.f32": ("mul.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: a * b),
    "mul.sat.f32": ("mul.sat.f32 %0, %1, %2;", "f32", "f32 f32",
                    lambda a, b: 0.0 if math.isnan(a * b) else min(1.0, max(0.0, a * b))),
    "add.rz.f32": ("add.rz.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: directed(a + b, "rz")),
    "mul.rm.f32": ("mul.rm.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: directed(a * b, "rm")),
    "fma.rn.f32": ("fma.rn.f32 %0, %1, %2, %3;", "f32", "f32 f32 f32", lambda a, b, c: a * b + c),
    "div.rn.f32": ("div.rn.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: float(np.float64(a) / np.float64(b))),
    "min.f32": ("min.f32 %0, %1, %2;", "f32", "f32 f32", pmin),
    "max.NaN.f32": ("max.NaN.f32 %0, %1, %2;", "f32", "f32 f32",
                    lambda a, b: math.nan if math.isnan(a) or math.isnan(b) else max(a, b)),
    "abs.f32": ("abs.f32 %0, %1;", "f32", "f32", abs),
    "copysign.f32": ("copysign.f32 %0, %1, %2;", "f32", "f32 f32", lambda a, b: math.copysign(b, a)),
    "rcp.rn.f32": ("rcp.rn.f32 %0, %1;", "f32", "f32", lambda a: float(1 / np.float64(a))),
    "sqrt.rn.f32": ("sqrt.rn.f32 %0, %1;", "f32", "f32", lambda a: float(np.sqrt(np.float64(a)))),
    "ex2.approx.ftz.f32": ("ex2.approx.ftz.f32 %0, %1;", "f32", "f32", lambda a: ftz(f32(np.exp2(np.float64(ftz(a)))))),
    "add.f64": ("add.f64 %0, %1, %2;", "f64", "f64 f64", lambda a, b: a + b),
    "fma.rn.f64": ("fma.rn.f64 %0, %1, %2, %3;", "f64", "f64 f64 f64",
                   lambda a, b, c: float(np.float64(np.longdouble(a) * np.longdouble(b) + np.longdouble(c)))),
    "setp.neu": (predicate("setp.neu.f32 p, %1, %2"), "u32", "f32 f32", lambda a, b: a != b),
    "setp.ne": (predicate("setp.ne.f32 p, %1, %2"), "u32", "f32 f32", lambda a, b: a < b or a > b),
    "setp.ltu": (predicate("setp.ltu.f32 p, %1, %2"), "u32", "f32 f32", lambda a, b: not a >= b),
    "setp.ge": (predicate("setp.ge.f32 p, %1, %2"), "u32", "f32 f32", lambda a, b: a >= b),
    "setp.num": (predicate("setp.num.f32 p, %1, %2"), "u32", "f32 f32", lambda a, b: a == a and b == b),
    "testp.finite": (predicate("testp.finite.f32 p, %1"), "u32", "f32", math.isfinite),
    "testp.subnormal": (predicate("testp.subnormal.f32 p, %1"), "u32", "f32", lambda a: 0 < abs(a) < 2.0**-126),
    "cvt.rzi.s32.f32": ("cvt.rzi.s32.f32 %0, %1;", "s32", "f32", lambda a: to_integer(a, int, 32, True)),
    "cvt.rni.s32.f32": ("cvt.rni.s32.f32 %0, %1;", "s32", "f32", lambda a: to_integer(a, round, 32, True)),
    "cvt.rmi.u32.f32": ("cvt.rmi.u32.f32 %0, %1;", "u32", "f32", lambda a: to_integer(a, math.floor, 32, False)),
    "cvt.rpi.s64.f64": ("cvt.rpi.s64.f64 %0, %1;", "s64", "f64", lambda a: to_integer(a, math.ceil, 64, True)),
    "cvt.rzi.u64.f32": ("cvt.rzi.u64.f32 %0, %1;", "u64", "f32", lambda a: to_integer(a, int, 64, False)),
    "cvt.rni.f32.f32": ("cvt.rni.f32.f32 %0, %1;", "f32", "f32", lambda a: float(np.rint(a))),
    "cvt.rn.f32.s32": ("cvt.rn.f32.s32 %0, %1;", "f32", "s32", float),
    "cvt.rn.f32.u64": ("cvt.rn.f32.u64 %0, %1;", "f32", "u64", lambda a: float(np.uint64(a).astype(np.float32))),
    "cvt.rz.f32.s32": ("cvt.rz.f32.s32 %0, %1;", "f32", "s32", lambda a: directed(float(a), "rz")),
    "cvt.f64.f32": ("cvt.f64.f32 %0, %1;", "f64", "f32", lambda a: a),
    "cvt.rn.f32.f64": ("cvt.rn.f32.f64 %0, %1;", "f32", "f64", lambda a: a),
    "cvt.rn.bf16.f32": ("cvt.rn.bf16.f32 %0, %1;", "bf16", "f32",
            lambda a: int(f32_to_bf16(np.array([a], np.float32))[0])),
    "cvt.f32.f16": ("cvt.f32.f16 %0, %1;", "f32", "f16", lambda a: float(np.uint16(a).view(np.float16))),
    "cvt.rn.f16.f32": ("cvt.rn.f16.f32 %0, %1;", "f16", "f32",
            half),
    "cvt.rn.bf16x2.f32": ("cvt.rn.bf16x2.f32 %0, %1, %2;", "bf16x2", "f32 f32", lambda a, b: pair([b, a], "bf16")),
    "cvt.rn.f16x2.f32": ("cvt.rn.f16x2.f32 %0, %1, %2;", "f16x2", "f32 f32",
                         lambda a, b: half(b) | half(a) << 16),
    "cvt.rna.tf32.f32": ("cvt.rna.tf32.f32 %0, %1;", "u32", "f32", tf32_rna),
    "fma.rn.f16x2": ("fma.rn.f16x2 %0, %1, %2, %2;", "f16x2", "f16x2 f16x2", None),
    "mul.bf16x2": ("{.reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 %0, %1, %2, z;}",
                   "bf16x2", "bf16x2 bf16x2", None),
}  # fmt: skip
TABLE = INTEGER | FLOAT
AWKWARD = {
    "u": [0, 1, 2, 5, 31, 32, 33, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, M64, 1 << 63],
    "f": [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        math.inf,
        -math.inf,
        math.nan,
        1e-40,
        -1e-42,
        3e38,
        2147483648.0,
        1e20,
    ],
}


def source_text() -> str:
    lines = ["#include <cuda_runtime.h>"]
    cases = []
    for index, (assembly, to_type, from_types, _) in enumerate(TABLE.values()):
        types = from_types.split()
        loads = "".join(f"  const {C_TYPES[t][0]}* p{i} = (const {C_TYPES[t][0]}*)s{i};\n" for i, t in enumerate(types))
        inputs = ", ".join(f'"{C_TYPES[t][1]}"(p{i}[at])' for i, t in enumerate(types))
        lines.append(
            f"__global__ void kernel_{index}(const void* s0, const void* s1, const void* s2, void* out) {{\n{loads}"
            f"  const int at = blockIdx.x * blockDim.x + threadIdx.x;\n  {C_TYPES[to_type][0]} result;\n"
            f'  asm volatile("{assembly}" : "={C_TYPES[to_type][1]}"(result) : {inputs});\n'
            f"  (({C_TYPES[to_type][0]}*)out)[at] = result;\n}}"
        )
        cases.append(f"    case {index}: kernel_{index}<<<{N // 64}, 64>>>(s0, s1, s2, out); break;")
    lines.append(
        'extern "C" int run(int which, const void* s0, const void* s1, const void* s2, void* out) {\n'
        "  switch (which) {\n" + "\n".join(cases) + "\n  }\n  return cudaGetLastError();\n}"
    )
    return "\n".join(lines)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = tmp_path_factory.getbasetemp() / "instructions.cu"
    source.write_text(source_text())
    return Library([source])


def inputs(type_name: str, rng) -> np.ndarray:
    """Random values; every pair of awkward values meets somewhere, as each operand is shuffled on its own."""
    dtype = np.dtype(DTYPES[type_name])
    if dtype.kind == "f":
        values = rng.standard_normal(N) * 10.0 ** rng.integers(-3, 4, N)
        awkward = AWKWARD["f"] * 4
    elif "f" in type_name:
        values = rng.integers(0, 1 << 8 * dtype.itemsize, N, np.uint64)
        small = f32_to_bf16(rng.standard_normal(2 * N).astype(np.float32))
        if type_name.startswith("f16"):
            small = rng.standard_normal(2 * N).astype(np.float16).view(np.uint16)
        return small.view(dtype)[:N].copy()
    else:
        values = (
            rng.integers(0, 1 << 64, N, np.uint64, endpoint=False)
            if dtype.itemsize == 8
            else rng.integers(0, 1 << 32, N)
        )
        values = np.where(rng.random(N) < 0.5, values, values % np.array(100, values.dtype))
        awkward = AWKWARD["u"] * 4
        values[: len(awkward)] = np.array(awkward, np.uint64).astype(values.dtype)
        return rng.permutation(values.astype(dtype))
    values[: len(awkward)] = awkward
    return rng.permutation(values.astype(dtype))


def expected(name: str, sources) -> list:
    _, to_type, _, function = TABLE[name]
    if function is None:
        kind = to_type[:-2]
        combine = (lambda a, b: a * b + b) if name.startswith("fma") else (lambda a, b: a * b)
        words = (tuple(int(x) for x in row) for row in zip(*sources, strict=True))
        return [
            pair([combine(a, b) for a, b in zip(halves(x, kind), halves(y, kind), strict=True)], kind) for x, y in words
        ]
    return [function(*(x.item() for x in row)) for row in zip(*sources, strict=True)]


@pytest.mark.parametrize("name", TABLE)
def test_instruction(library, name):
    _, to_type, from_types, _ = TABLE[name]
    rng = np.random.default_rng(len(name))
    sources = [inputs(type_name, rng) for type_name in from_types.split()]
    device = Device(library)
    buffers = [device.put(source) for source in sources]
    out = device.empty(N, DTYPES[to_type])
    device.call("run", list(TABLE).index(name), *buffers, *[None] * (3 - len(buffers)), out)
    got = device.get(out)
    with np.errstate(all="ignore"):
        want = expected(name, sources)
        if got.dtype.kind == "f":
            want = np.array(want, np.float64).astype(got.dtype)
            assert np.array_equal(np.signbit(got[got == 0]), np.signbit(want[got == 0]))
        else:
            want = np.array([int(x) & (1 << 8 * got.dtype.itemsize) - 1 for x in want], f"u{got.itemsize}").view(
                got.dtype
            )
    np.testing.assert_array_equal(got, want)
