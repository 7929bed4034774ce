"""Measures and pages that need no label, on features that are known."""

import pytest
import torch

from ltood_fast.eval.plots import clusters_picture, draw_pictures, retrieval_picture
from ltood_fast.eval.report import format_findings, format_table, render_live, render_page
from ltood_fast.eval.results import RunResults, StageResult
from ltood_fast.eval.signatures import check_signatures
from ltood_fast.eval.without_labels import Embedded, evaluate_without_labels, view_recall

AXES = torch.eye(3)


def numbered(n):
    """Images whose pixels are their number."""
    return torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).contiguous()


def three_bundles(n, seed):
    """Features near three axes, 3, 2 and 1 sixths of them."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(n // 6)
    return axis, AXES[axis] + 0.05 * torch.randn(n, 3, generator=generator)


@pytest.fixture
def measured():
    train_axis, train = three_bundles(60, 0)
    test_axis, test = three_bundles(18, 1)
    fields = evaluate_without_labels(
        Embedded(numbered(60), train), Embedded(numbered(18), test), (test, test + 0.001), 3, seed=0
    )
    return train_axis, test_axis, fields


def test_views_that_find_each_other():
    rows = torch.eye(4)
    assert view_recall(rows, rows) == 1.0
    assert view_recall(rows, rows[[1, 0, 2, 3]]) == 0.5
    assert view_recall(rows, 7 * rows) == 1.0  # by cosine


def test_clusters_are_those_of_the_bundles(measured):
    train_axis, _, fields = measured
    found = fields["without_labels"]
    assert found.cluster_sizes == [30, 20, 10]
    assert found.silhouette > 0.8
    assert found.view_recall > 0.9
    for axis, images in enumerate(found.cluster_images):
        assert len(images) == 10
        assert train_axis[images[:, 0, 0, 0].long()].unique().tolist() == [axis]


def test_the_first_image_of_a_cluster_is_its_most_typical():
    train = torch.nn.functional.normalize(torch.tensor([[1.0, 0.4], [1.0, 0.0], [1.0, -0.4]]), dim=1)
    fields = evaluate_without_labels(Embedded(numbered(3), train), Embedded(numbered(3), train), (train, train), 1)
    assert fields["without_labels"].cluster_images[0][0].unique().tolist() == [1]
    assert fields["without_labels"].silhouette is None  # one cluster


def test_what_is_retrieved_is_near(measured):
    train_axis, test_axis, fields = measured
    for row in fields["without_labels"].retrieved:
        query, *nearest = row[:, 0, 0, 0].tolist()
        assert len(nearest) == 8
        assert set(train_axis[nearest].tolist()) == {int(test_axis[query])}


def test_fewer_images_than_clusters():
    rows = torch.eye(4)[:3]
    fields = evaluate_without_labels(Embedded(numbered(3), rows), Embedded(numbered(2), rows[:2]), (rows, rows), 10)
    assert fields["without_labels"].cluster_sizes == [1, 1, 1]
    assert fields["without_labels"].silhouette is None
    assert all(len(row) == 4 for row in fields["without_labels"].retrieved)


@pytest.fixture
def results(measured):
    stage = StageResult("simclr", history=[{"epoch": 0, "loss": 1.0, "seconds": 3.0}], **measured[2])
    return RunResults("mine", (), (), "rank", [stage])


def test_a_report_without_labels(results):
    pictures = draw_pictures(results)
    assert [picture.name for picture in pictures] == ["history", "embedding", "clusters", "retrieval"]
    page = render_page(results, check_signatures(results), pictures)
    assert "coloured by cluster" in page
    assert "Most frequent mistakes" not in page
    assert "No image has a label" in format_findings(results)
    assert format_table(results).splitlines()[0].split() == ["uniformity", "silhouette", "views", "found", "alignment"]


def test_the_alternative_texts_say_how_many(results):
    (stage,) = results.stages
    assert clusters_picture(stage).alt == "A row for each of 3 clusters of 30, 20, 10 images."
    assert retrieval_picture(stage).alt.startswith("10 rows of thumbnails")


@pytest.mark.parametrize(("left", "said"), [(None, ""), (20, "about 1 min left"), (7300, "about 2 h 2 min left")])
def test_the_time_left_in_words(left, said, results):
    page = render_live(results, draw_pictures(results)[0], "simclr", 1, 8, left, 60)
    assert said in page
    assert (" left in this stage" in page) == bool(said)
