"""Compares a dump of conformance.cu, made on a GPU, with the simulator.

python -m ptxsim.conformance compare dump.bin     exits with 1 if anything differs
python -m ptxsim.conformance dump out.bin         writes what the simulator gives, in the same format"""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .errors import SimError
from .runtime import Device, Library

MAGIC = b"LTCONF1\n"
SOURCE = "python_tests/ptxsim/conformance.cu"
# Sums: tensor cores round elsewhere than we do. ex2.approx is good to 2^-22 (PTX ISA).
RELATIVE, ABSOLUTE = 2.0**-20, 2.0**-18


class Header(ctypes.Structure):
    """struct Case of conformance.cu."""

    _fields_ = [
        ("name", ctypes.c_char * 32), ("kind", ctypes.c_int), ("input_bytes", ctypes.c_int),
        ("output_bytes", ctypes.c_int), ("exact", ctypes.c_int),
    ]  # fmt: skip


@dataclass
class Record:
    header: Header
    input: bytes
    output: bytes

    @property
    def name(self) -> str:
        return self.header.name.decode()


@cache
def library() -> Library:
    return Library([SOURCE], arch="90a", defines={"LTOOD_HOPPER": "1"})


def cases() -> dict[str, tuple[int, Header]]:
    found = {}
    for which in range(library().host.conformance_count()):
        header = Header()
        library().host.conformance_case(which, ctypes.byref(header))
        found[header.name.decode()] = which, header
    return found


def simulate(which: int, header: Header, data: bytes, seed: int = 0) -> bytes:
    device = Device(library(), seed=seed)
    out = device.empty(header.output_bytes, np.uint8)
    if error := device.call("conformance_run", which, device.put(np.frombuffer(data, np.uint8)), out):
        raise SimError(f"{header.name.decode()}: error {error}: {device.complaint}")
    return device.get(out).tobytes()


def make_records(seed: int = 1) -> list[Record]:
    records = []
    for which, header in cases().values():
        data = ctypes.create_string_buffer(header.input_bytes)
        library().host.conformance_inputs(which, seed, data)
        records.append(Record(header, data.raw, simulate(which, header, data.raw)))
    return records


def write_dump(path: Path, records: list[Record]):
    path.write_bytes(MAGIC + b"".join(bytes(r.header) + r.input + r.output for r in records))


def read_dump(path: Path) -> list[Record]:
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        raise SimError(f"{path} is no conformance dump")
    records, at = [], len(MAGIC)
    while at < len(data):
        header = Header.from_buffer_copy(data[at:].ljust(ctypes.sizeof(Header), b"\0"))
        middle = at + ctypes.sizeof(Header) + header.input_bytes
        end = middle + header.output_bytes
        if end > len(data):
            raise SimError(f"{path} is cut short")
        records.append(Record(header, data[middle - header.input_bytes : middle], data[middle:end]))
        at = end
    return records


def difference(record: Record) -> str | None:
    """What the simulator gives otherwise than a record, in words."""
    known = cases().get(record.name)
    if known is None or bytes(known[1]) != bytes(record.header):
        return "not a case of this conformance.cu"
    ours = simulate(known[0], known[1], record.input)
    if record.header.exact:
        got, want = (np.frombuffer(data, np.uint32) for data in (ours, record.output))
        wrong = got != want
    else:
        got, want = (np.frombuffer(data, np.float32).astype(np.float64) for data in (ours, record.output))
        wrong = ~(np.abs(got - want) <= ABSOLUTE + RELATIVE * np.abs(want))
    if not wrong.any():
        return None
    first = int(np.flatnonzero(wrong)[0])
    return (
        f"{int(wrong.sum())} of {wrong.size} words differ; word {first}: hardware {want[first]}, simulator {got[first]}"
    )


def compare(records: list[Record]) -> dict[str, str]:
    """Failures by case; a case that the dump lacks is no failure (Ampere has no TMA)."""
    return {record.name: why for record in records if (why := difference(record))}


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("compare", "dump"):
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[1])
    if arguments[0] == "dump":
        write_dump(path, make_records())
        return 0
    records = read_dump(path)
    failures = compare(records)
    for record in records:
        print(f"{record.name:20} {failures.get(record.name, 'as on the hardware')}")
    missing = sorted(set(cases()) - {record.name for record in records})
    if missing:
        print(f"not in the dump: {', '.join(missing)}")
    return 1 if failures or not records else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
