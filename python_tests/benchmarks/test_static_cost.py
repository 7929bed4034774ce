"""The reader of machine code on listings written by hand, and the model on numbers that can be checked by hand."""

from collections import Counter

import pytest

from benchmarks.__main__ import main
from benchmarks.static_cost import chips, model, report, sass, toolchain, wgmma_order
from benchmarks.static_cost.hot import Hot, hot


def listing(*lines: str) -> sass.Function:
    """A function of these instructions; a line that ends with a colon is a label."""
    text, address = ['\t.section\t.text.kernel,"ax",@progbits'], 0
    for line in lines:
        text.append(line if line.endswith(":") else f"        /*{address:04x}*/                   {line} ;")
        address += 0 if line.endswith(":") else 16
    (function,) = sass.parse("\n".join(text))
    return function


HGMMA = "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24"
# A loop over tiles around a loop over k_tiles of two products; the epilogue takes a slow way where P2 says so.
KERNEL = listing(
    "MOV R0, RZ",
    ".L_x_0:",
    "WARPGROUP.ARRIVE",
    ".L_x_1:",
    "R2UR UR4, R2",
    HGMMA,
    HGMMA + ", gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P0 BRA `(.L_x_1)",
    "@P2 BRA `(.L_x_2)",
    "FMUL R24, R24, R3",
    "MUFU.EX2 R24, R24",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "ISETP.LT.AND P3, PT, R0, R1, PT",
    "FMUL R24, R24, R3",
    "FSEL R24, R24, R5, P3",
    "MUFU.EX2 R24, R24",
    ".L_x_3:",
    "@P1 BRA `(.L_x_0)",
    "EXIT",
)


def test_loops_are_found_and_counted():
    assert len(KERNEL.loops) == 2
    found = hot(KERNEL)
    assert (found.products, found.waits, found.exponentials) == (2, 1, 1)
    (step,) = found.steps
    assert step == Counter({"uniform": 1, "tensor": 2, "control": 2})
    assert found.tile == Counter({"fma": 1, "special": 1, "control": 4})  # arrive, three branches; the fast epilogue
    assert found.per_product == 2.5


def test_a_loop_without_products_is_not_hot():
    assert hot(listing(".L_x_0:", "FADD R1, R1, R2", "@P0 BRA `(.L_x_0)", "EXIT")) is None


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [("FFMA.FTZ", "fma"), ("IMAD.WIDE", "imad"), ("LOP3.LUT", "alu"), ("MUFU.EX2", "special"), ("UIADD3", "uniform"),
     ("HMMA.16816.F32", "tensor"), ("LDS.64", "shared"), ("LDG.E", "global"), ("STL", "local"),
     ("BAR.SYNC", "control")],
)  # fmt: skip
def test_instructions_have_a_pipe(opcode, pipe):
    assert sass.Instruction(0, "", opcode, "").pipe == pipe


ARRIVE, WAIT_0, WAIT_1 = "WARPGROUP.ARRIVE", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
OTHER = "HGMMA.64x64x16.F32 R64, R8, gdesc[UR4].tnspB, R64, gsb0"


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ((ARRIVE, HGMMA + ", gsb0", WAIT_0, "FMUL R0, R24, R1", "EXIT"), None),
        ((ARRIVE, HGMMA + ", gsb0", "FMUL R0, R24, R1", WAIT_0, "EXIT"), "touches an accumulator in flight"),
        ((ARRIVE, HGMMA + ", gsb0", "MOV R55, R1", WAIT_0, "EXIT"), "touches an accumulator in flight"),
        ((ARRIVE, HGMMA + ", gsb0", "MOV R56, R1", WAIT_0, "EXIT"), None),
        # the first of two groups has ended
        ((ARRIVE, HGMMA + ", gsb0", OTHER, WAIT_1, "FMUL R0, R24, R1", WAIT_0, "EXIT"), None),
        ((ARRIVE, HGMMA + ", gsb0", OTHER, WAIT_1, "FMUL R0, R64, R1", WAIT_0, "EXIT"), "touches an accumulator"),
        ((ARRIVE, OTHER, "FADD R1, R8, R9", WAIT_0, "EXIT"), None),  # A may be read
        ((ARRIVE, OTHER, "LDS.128 R4, [R1]", WAIT_0, "EXIT"), None),
        ((ARRIVE, OTHER, "LDS.128 R5, [R1]", WAIT_0, "EXIT"), "overwrites a register of A"),
        (("MOV R24, R1", ARRIVE, HGMMA + ", gsb0", WAIT_0, "EXIT"), None),
        ((ARRIVE, "MOV R24, R1", HGMMA + ", gsb0", WAIT_0, "EXIT"), "has no fence"),
        ((ARRIVE, "HGMMA.64x128x16.F32 R32, gdesc[UR4], R32, gsb0", HGMMA, WAIT_0, "EXIT"), "another shape"),
        ((ARRIVE, "HGMMA.64x64x16.F32 R8, gdesc[UR4], R8, gsb0", OTHER, WAIT_0, "EXIT"), "another product"),
        ((ARRIVE, HGMMA + ", gsb0", "EXIT"), "ends with products in flight"),
        # one side of a branch, and the second time around a loop
        ((ARRIVE, HGMMA + ", gsb0", "@P0 BRA `(.L_x_0)", WAIT_0, ".L_x_0:", "FMUL R0, R24, R1", WAIT_0, "EXIT"),
         "touches"),
        ((ARRIVE, ".L_x_0:", "FMUL R0, R24, R1", HGMMA + ", gsb0", "@P0 BRA `(.L_x_0)", WAIT_0, "EXIT"), "touches"),
    ],
)  # fmt: skip
def test_registers_in_flight_are_watched(lines, kind):
    kinds = {fault.kind for fault in wgmma_order.faults(listing(*lines))}
    assert (not kinds) if kind is None else any(kind in found for found in kinds)


def test_reports_of_ptxas_are_read():
    text = """ptxas info    : (C7519) warpgroup.arrive is injected in around line 10 by compiler
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
    assert toolchain.resources(text) == {"kernel": toolchain.Resources(168, 14)}
    assert [line.split(")")[0] for line in toolchain.faults(text)] == ["ptxas info    : (C7515"]


def test_turns_hide_what_is_shorter():
    """Bound by products, by the pipe that two epilogues share, by one's own chain, by L2."""
    assert model.Turns(1000, 500, 400, handover=100).period == pytest.approx(2000, rel=0.01)
    assert model.Turns(100, 1000, 1000, handover=0).period == pytest.approx(2000, rel=0.06)
    assert model.Turns(500, 1000, 100, handover=100).period == pytest.approx(1600, rel=0.01)
    assert model.Turns(100, 100, 50, 24 * 5000, handover=0).period == pytest.approx(5000)


def test_the_triangle_covers_every_tile():
    """Row tiles × column tiles of all sweeps: every pair of the upper triangle once, and the diagonal's neighbours."""
    for n, together in ((4096, 1), (16_384, 2), (65_536, 2)):
        tiles = n // 128
        covered = sum(map(sum, model.Triangle(n, together).sweeps())) * together
        assert covered == tiles * (tiles + 1) // 2 + (tiles // 2 if together == 2 else 0)


def test_predictions_follow_the_counts():
    """Twice the exponentials cannot be faster, and D = 128 of the special functions' kind is bound by them."""
    few = Hot((Counter(tensor=8, alu=2),), Counter(special=64, fma=256), 64, 8, 1)
    many = Hot((Counter(tensor=8, alu=2),), Counter(special=128, fma=512), 128, 8, 1)
    times = [model.forward_us(16_384, 2, model.forward_turns(x, 2, True)) for x in (few, many)]
    assert times[0] < times[1]
    assert chips.clocks(many.tile)["special"] == 1024


def test_the_committed_tables_are_those_of_the_counts():
    result = report.read()
    assert result["kind"] == "prediction"
    assert report.markdown(result) == report.OUTPUT.with_suffix(".md").read_text(encoding="utf-8")
    assert report.predictions(result["kernels"]) == {key: result[key] for key in ("tiles", "nt_xent")}


def test_without_a_compiler_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    assert main(["static-cost"]) == 2
    assert "nvcc is needed" in capsys.readouterr().err
