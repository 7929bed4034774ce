"""Pictures of the benchmarks: a look for each name, labels that do not overlap, titles that the rows support."""

import io
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import experiments_picture, plots
from benchmarks.picture_style import LOOKS, SOURCE, label_ends, png


def test_no_two_names_look_alike():
    assert len({look.color for look in LOOKS.values()}) == len(LOOKS)
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)


@pytest.mark.parametrize("values", [(1.0, 1.01, 1.02), (990.0, 995.0, 1000.0), (1.0, 30.0, 1000.0)])
def test_labels_at_line_ends_keep_their_distance(values):
    """Crowded below, crowded at the upper edge (where they must not leave the axes), far apart (where they stay)."""
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(1.0, 1000.0))
    label_ends(axes, [(1.0, y, f"label {y}", "black") for y in values], gap=0.1)
    heights = [math.log10(text.xy[1]) / 3 for text in axes.texts]
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[-1] <= 1 + 1e-9
    if values[1] == 30.0:
        assert [round(10 ** (3 * height), 6) for height in heights] == list(values)


def rows(ours_small: float) -> list[dict]:
    times = {("ours", 256): ours_small, ("plain", 256): 1.0, ("ours", 1024): 1.0, ("plain", 1024): 2.0}
    return [
        {"op": "nt_xent", "implementation": name, "N": n, "median_ms": ms, "peak_mib": ms}
        for (name, n), ms in times.items()
    ]


@pytest.mark.parametrize(
    ("ours_small", "finding"),
    [(1.5, "From N = 1,024 on ltood_fast is fastest"), (0.5, "fastest, in the least memory, at every N")],
)
def test_the_title_claims_only_sizes_where_it_holds(ours_small, finding):
    assert finding in plots._least_from(rows(ours_small))


def test_a_picture_names_its_source():
    image = Image.open(io.BytesIO(png(Figure(figsize=(1, 1), layout="constrained"), "digest")))
    assert image.info[SOURCE] == "digest"


@pytest.mark.parametrize(("decision", "count"), [("not decided", "None of 1 differences"), ("held", "1 of 1")])
def test_the_forest_counts_what_is_decided(decision, count, monkeypatch):
    said = []
    monkeypatch.setattr(experiments_picture, "headline", lambda figure, finding, setting: said.append(finding))
    difference = {"better": "a", "worse": "b", "measure": "overall", "mean": 0.01, "low": 0.0, "high": 0.02, "n": 3}
    experiments_picture.draw({"some": {"comparisons": [{**difference, "decision": decision}]}})
    assert said[0].startswith(count)


def test_bars_are_the_intervals_of_the_verdict():
    difference = {"mean": 0.01, "low": -0.01, "high": 0.02}
    assert experiments_picture._bar(difference) == [[pytest.approx(2.0)], [pytest.approx(1.0)]]
