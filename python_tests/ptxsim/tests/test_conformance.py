"""The conformance dump, made here by the simulator itself: it is right by an independent account of the layouts, it
survives the file, and a dump that differs is refused."""

import numpy as np
import pytest
from ptxsim import SimError, conformance
from ptxsim.values import bf16_to_f32


@pytest.fixture(scope="module")
def records():
    return {record.name: record for record in conformance.make_records()}


@pytest.fixture(scope="module")
def dump(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("conformance") / "dump.bin"
    conformance.write_dump(path, list(records.values()))
    return path


def test_the_simulator_conforms_to_itself(dump, capsys):
    assert conformance.main(["compare", str(dump)]) == 0
    assert capsys.readouterr().out.count("as on the hardware") == len(conformance.cases()) == 14


@pytest.mark.parametrize("name", ["ldmatrix", "mma_bf16", "mma_tf32", "shuffle", "wgmma_registers_n64", "tma"])
def test_a_dump_that_differs_is_refused(records, name, tmp_path, capsys):
    record = records[name]
    damaged = bytearray(record.output)
    damaged[3] ^= 0x40  # the exponent of a float
    path = tmp_path / "damaged.bin"
    conformance.write_dump(path, [conformance.Record(record.header, record.input, bytes(damaged))])
    assert conformance.main(["compare", str(path)]) == 1
    assert "1 of" in capsys.readouterr().out


def test_a_file_that_is_no_dump_is_refused(dump, tmp_path):
    path = tmp_path / "short.bin"
    path.write_bytes(dump.read_bytes()[:-1])
    with pytest.raises(SimError, match="cut short"):
        conformance.read_dump(path)
    path.write_bytes(b"something else")
    with pytest.raises(SimError, match="no conformance dump"):
        conformance.read_dump(path)


def words(record, dtype):
    return np.frombuffer(record.input, dtype), np.frombuffer(record.output, dtype)


def test_ldmatrix_by_the_manual(records):
    """Lane l holds of each matrix the elements 2 (l % 4), + 1 of row l / 4; transposed: of column l / 4."""
    for name in ("ldmatrix", "ldmatrix_trans"):
        source, found = words(records[name], np.uint16)
        for lane in range(32):
            for matrix in range(4):
                for half in range(2):
                    row, column = lane // 4, 2 * (lane % 4) + half
                    if name.endswith("trans"):
                        row, column = column, row
                    assert found[lane * 8 + matrix * 2 + half] == source[matrix * 64 + row * 8 + column]


def a_register(register, lane):
    """(row, first column) of a register of A of m16n8k16."""
    return lane // 4 + 8 * (register % 2), 2 * (lane % 4) + 8 * (register // 2)


@pytest.mark.parametrize("name", ["mma_bf16", "mma_f16", "mma_tf32"])
def test_mma_by_the_manual(records, name):
    source, found = np.frombuffer(records[name].input, np.uint32), np.frombuffer(records[name].output, np.float32)
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        registers = source[lane * 6 : lane * 6 + 6]
        if name == "mma_tf32":  # one element a register, K = 8
            numbers = (registers & np.uint32(0xFFFFE000)).view(np.float32)
            for r in range(4):
                a[lane // 4 + 8 * (r % 2), lane % 4 + 4 * (r // 2)] = numbers[r]
            for r in range(2):
                b[lane % 4 + 4 * r, lane // 4] = numbers[4 + r]
            continue
        halves = registers.view(np.uint16)
        numbers = bf16_to_f32(halves) if name == "mma_bf16" else halves.view(np.float16)
        for r in range(4):
            row, column = a_register(r, lane)
            a[row, column : column + 2] = numbers[2 * r : 2 * r + 2]
        for r in range(2):
            row = 2 * (lane % 4) + 8 * r
            b[row : row + 2, lane // 4] = numbers[8 + 2 * r : 10 + 2 * r]
    product = a @ b
    for lane in range(32):
        for r in range(4):
            want = product[lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2] + lane + r
            np.testing.assert_allclose(found[lane * 4 + r], want, rtol=1e-6)


def test_cp_async_fills_with_zeros(records):
    source, found = (x.reshape(32, 16) for x in words(records["cp_async"], np.uint8))
    for lane in range(32):
        count = lane % 17
        assert found[lane].tolist() == source[lane, :count].tolist() + [0] * (16 - count)


def test_shuffles_by_the_manual(records):
    source = np.frombuffer(records["shuffle"].input, np.uint32)
    found = np.frombuffer(records["shuffle"].output, np.uint32).reshape(8, 32, 2)
    for lane in range(32):
        group = lane // 8 * 8  # of the segmented forms, 8 wide
        sources = [
            (lane - 3, lane >= 3), (lane - 2, lane - 2 >= group), (lane + 5, lane + 5 < 32),
            (lane + 3, lane + 3 < group + 8), (lane ^ 7, True), (lane ^ 12, (lane ^ 12) < group + 8),
            (lane * 5 % 32, True), (group + (lane + 3) % 8, True),
        ]  # fmt: skip
        for mode, (other, inside) in enumerate(sources):
            assert found[mode, lane].tolist() == [source[other if inside else lane], inside]


def test_a_tma_tile_by_the_manual(records):
    """Box of 64 × 64 at column 64, row 16 of the second plane of [2, 50, 96]: zeros outside, 16-byte chunks mixed by
    row % 8."""
    source = np.frombuffer(records["tma"].input, np.uint16).reshape(2, 50, 96)[1]
    found = np.frombuffer(records["tma"].output, np.uint16).reshape(64, 8, 8)
    tile = np.zeros((64, 64), np.uint16)
    tile[:34, :32] = source[16:, 64:]
    for row in range(64):
        for chunk in range(8):
            assert found[row, chunk ^ row % 8].tolist() == tile[row, chunk * 8 : chunk * 8 + 8].tolist()


def unswizzled(data):
    """16-bit tiles of 64 rows and 64 columns as the copy engine lays them out."""
    raw = np.frombuffer(data, np.uint16).reshape(-1, 64, 8, 8)
    chunk = np.arange(8) ^ np.arange(64)[:, None] % 8
    return [np.take_along_axis(tile, chunk[:, :, None], 1).reshape(64, 64) for tile in raw]


def assert_accumulators(record, product):
    """Element 4 j + 2 r + h of a thread is row g + 8 r of its warp's 16, column 8 j + 2 q + h."""
    found = np.frombuffer(record.output, np.float32).reshape(4, 8, 4, -1, 2, 2)  # warp, g, q, j, r, h
    found = found.transpose(0, 4, 1, 3, 2, 5).reshape(product.shape)
    np.testing.assert_allclose(found, product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "numbers"), [("n64", bf16_to_f32), ("n128", lambda x: x.view(np.float16))])
def test_wgmma_by_the_manual(records, name, numbers):
    """Tiles are read through the same swizzle that TMA writes: along K, or with K along their rows."""
    record = records[f"wgmma_shared_{name}"]
    a, *tiles = (numbers(tile).astype(np.float64) for tile in unswizzled(record.input))
    assert_accumulators(record, a @ np.concatenate(tiles).T)
    record = records[f"wgmma_registers_{name}"]
    tiles = [numbers(tile).astype(np.float64) for tile in unswizzled(record.input[:-2048])]
    fragments = numbers(np.frombuffer(record.input[-2048:], np.uint16)).astype(np.float64)
    a = fragments.reshape(4, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(64, 16)  # warp, g, q, half of K, r, h
    # The kernel multiplies the same 16 columns of A with every 16 rows of B.
    assert_accumulators(record, sum(a @ np.concatenate(tiles, 1)[k : k + 16] for k in range(0, 64, 16)))
