"""The scaling benchmark: its formulas against counts by hand, its table and picture of made-up measurements."""

from dataclasses import asdict

import pytest

from benchmarks import scaling
from benchmarks.__main__ import parser


def test_bytes_are_those_of_the_other_ranks_rows():
    width = scaling.WIDTH
    assert scaling.exchanged_bytes(1, 100, 4, "gather") == 0
    assert scaling.exchanged_bytes(4, 100, 4, "gather") == 3 * 100 * (4 * width + 24)
    assert scaling.exchanged_bytes(4, 100, 2, "ring") == 3 * 100 * (2 * 2 * width + 24)


def test_flop_are_three_products_of_own_rows_and_all_rows():
    assert scaling.products_flop(4, 100) == 3 * 2 * 100 * 400 * scaling.WIDTH
    assert scaling.products_flop(1, 100) == 2 * 2 * 100 * 100 * scaling.WIDTH


def test_a_ring_that_leaves_the_node_runs_at_the_networks_rate():
    machine = scaling.Machine("m", 1e12, 1e9, 1e8, 8, 0.0, 4)
    inside, outside = (scaling.step_seconds(machine, ranks, 100, "gather")[1] for ranks in (8, 9))
    assert outside / inside == pytest.approx(10 * 8 / 7)
    slow = scaling.Machine("m", 1e12, 1e30, 1e30, 8, 1e-3, 4)
    assert scaling.step_seconds(slow, 5, 100, "gather")[1] == pytest.approx(8e-3)  # forward and backward, 4 hops each


def made_up():
    measured = [
        {
            "ranks": ranks, "rows_a_rank": scaling.rows_a_rank(kind, ranks), "exchange": exchange,
            "ms": 10.0, "cpu_ms": 8.0, "model_ms": 9.0, "sent_bytes": 2**20, "formula_bytes": 2**20,
            "gflop": 1.5, "peak_mib": 7.0, "embeddings_mib": 2.0,
        }
        for ranks in scaling.RANKS for kind in scaling.ROWS for exchange in scaling.EXCHANGES
    ]  # fmt: skip
    rows = [{"candidates": count, "seconds": count / 1e5, "peak_mib": 20.0} for count in scaling.CANDIDATES]
    return {
        "commit": "0123456789abcdef", "machine": {"device": "a processor"},
        "cores": 2, "load": 0.1, "measured": measured, "assumptions": asdict(scaling.GPU),
        "modelled": scaling.model(scaling.GPU),
        "sampler": {"rows": rows, "candidates": 10**7, "seconds": 100.0, "peak_mib": 20.0, "mib_per_million": 0.5},
    }  # fmt: skip


def test_the_table_says_what_is_measured_and_what_assumed():
    text = scaling.text(made_up())
    assert "2 cores, a thread a rank; 4 ranks oversubscribe them" in text
    assert "a model, not measured: 300 TFLOP/s, 400 GB/s in nodes of 8" in text
    assert "10,000,000  100.00      20.0" in text
    assert sum(line.lstrip().startswith(("strong", "weak")) for line in text.splitlines()) == 2 * 2 * len(scaling.GPUS)


def test_the_picture_is_drawn():
    assert scaling.draw(made_up())[1:4] == b"PNG"


def test_the_command_is_known(tmp_path):
    arguments = parser().parse_args(["scaling", "--results", str(tmp_path)])
    assert (arguments.function, arguments.results) == (scaling.main, tmp_path)
