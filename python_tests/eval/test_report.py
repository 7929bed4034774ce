"""Results, pictures and the two files of a report."""

import base64
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltood_fast.eval import plots, report
from ltood_fast.eval.results import SampleTensors, resampling_result, to_json
from ltood_fast.eval.runs import read_report

from .conftest import make_resampling, make_results, make_stage


@dataclasses.dataclass
class OodSet:
    """As much of an image set as a re-sampling reads."""

    images: torch.Tensor
    labels: torch.Tensor
    class_names: tuple = ("A", "B")

    def __len__(self):
        return len(self.images)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new"
    results, drawn = make_results(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda results: drawn.extend(plots.draw_pictures(results)) or drawn)
        page = report.write_report(folder, results)
    return results, folder, page.read_text(), drawn


def test_table_shows_the_stages_side_by_side():
    lines = report.format_table(make_results()).splitlines()
    assert lines[0].split() == ["overall", "Many", "Medium", "Few", "std", "kNN"]
    assert lines[1].split() == ["SimCLR", "88.80", "96.00", "90.00", "78.00", "7.48", "87.02"]
    assert lines[3].split() == ["Stage", "2", "94.00", "97.00", "93.33", "90.67", "2.60", "92.12"]
    assert len({len(line) for line in lines}) == 1


def test_table_has_a_dash_for_what_is_not_known():
    stage = make_stage("simclr", [0.5] * 10, knn=None)
    stage.probe["few"] = None
    assert report.format_table(make_results(stages=[stage])).splitlines()[1].split()[4:] == ["-", "0.00", "-"]


def test_json_holds_the_run_and_comes_back(written):
    results, folder = written[:2]
    data = read_report(folder / "report.json")
    assert data["schema_version"] == 1
    assert [stage["probe"] for stage in data["stages"]] == [stage.probe for stage in results.stages]
    assert data["stages"][0]["confusion"] == results.stages[0].confusion
    assert data["stages"][2]["history"] == results.stages[2].history
    assert data["resamplings"][-1]["tailness"] == results.resamplings[-1].tailness
    assert data["config"] == results.config
    assert data["build"] == results.build
    assert {s["name"]: s["state"] for s in data["signatures"]}["stage2_below_stage1"] == "ok"
    assert "test_features" not in data["stages"][0]
    assert "thumbnails" not in data["resamplings"][0]


def test_json_values_are_plain():
    value = {
        "a": math.nan,
        "b": [math.inf, torch.tensor([1, 2])],
        "c": np.float32(0.5),
        3: Path("x"),
        "d": (True, None),
    }
    assert to_json(value) == {"a": None, "b": [None, [1, 2]], "c": 0.5, "3": "x", "d": [True, None]}


def test_json_is_strict_even_with_nan_in_a_history(tmp_path):
    stage = make_stage("simclr", [0.5] * 10, history=[{"epoch": 0, "loss": math.nan}])
    report.write_report(tmp_path, make_results(stages=[stage], resamplings=[]))
    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["stages"][0]["history"][0]["loss"] is None


def test_page_holds_the_numbers_and_the_signatures(written):
    results, page = written[0], written[2]
    for line in report.format_table(results).splitlines()[1:]:
        for number in re.findall(r"\d+\.\d\d", line):
            assert f"<td>{number}</td>" in page
    for signature in report.check_signatures(results):
        assert signature.sentence.replace("'", "&#39;") in page
    assert "<td><code>stage1.budget</code></td><td>300</td>" in page
    assert "<td>torch</td><td>2.14.1</td>" in page
    assert "7 → 8 (10 of 50)" in page  # SimCLR has 40 of 50 sevens right
    cells = re.findall(r"<td>(.*?)</td>", re.search(r'<tr><th scope="row">7</th>(.*?)</tr>', page, re.DOTALL)[1])
    assert cells == ["5", "0.250", "0.125", "300", "2.0"]  # the re-sampling of epoch 7


def test_page_holds_every_picture_with_words_for_it(written):
    page, pictures = written[2:]
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)">', page)
    names = ["groups", "class_size", "tailness", "history", "embedding"]
    assert [p.name for p in pictures] == names
    assert len(images) == len(names)
    for (encoded, alt), picture in zip(images, pictures, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert min(image.size) > 300
        assert alt == picture.alt
        assert np.asarray(image.convert("L")).std() > 10  # not an empty canvas


def test_page_needs_nothing_from_outside(written):
    page = written[2]
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "http" not in page
    assert "<script" not in page


def test_page_escapes_names(tmp_path):
    names = ["<b>bird</b>", *map(str, range(1, 10))]
    page = report.write_report(
        tmp_path,
        make_results(class_names=names, resamplings=[], stages=[make_stage("simclr", [0.5] * 10, test_features=None)]),
    ).read_text()
    assert "&lt;b&gt;bird&lt;/b&gt;" in page
    assert "<b>bird" not in page


def test_failure_midway_leaves_the_old_files(tmp_path, monkeypatch):
    report.write_report(tmp_path, make_results(stages=[], resamplings=[]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["report.html", "report.json"]

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, make_results(name="second", stages=[], resamplings=[]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_failing_picture_leaves_the_old_files(tmp_path, monkeypatch):
    report.write_report(tmp_path, make_results(stages=[], resamplings=[]))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "draw_pictures", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path, make_results(name="second"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "which is no JSON"),
        ("[]", "which says None"),
        ('{"schema": "other"}', "which says 'other'"),
        ('{"schema": "ltood_fast.report", "schema_version": 99}', "schema_version must be 1, got 99"),
    ],
)
def test_foreign_report(tmp_path, content, sentence):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=f"^read_report: .*{sentence}"):
        read_report(tmp_path / "report.json")


def test_pictures_leave_out_what_the_run_does_not_have():
    bare = [make_stage("simclr", [0.5] * 10, history=[], test_features=None)]
    assert [p.name for p in plots.draw_pictures(make_results(stages=bare, resamplings=[]))] == ["groups", "class_size"]
    assert plots.draw_pictures(make_results(stages=[], resamplings=[])) == []


def test_tailness_picture_of_many_clusters_without_images():
    K = 40
    resampling = make_resampling(
        tailness=[math.nan, *(0.01 * c for c in range(1, K))], cluster_sizes=[10] * K, budget=[5] * K,
        cluster_classes=None, ood_classes=None, thumbnails=None,
    )  # fmt: skip
    picture = plots.tailness_picture(make_results(), resampling)
    assert "The 8 sparsest and densest of 40 are shown." in picture.caption
    assert "The sparsest cluster has tailness 0.39" in picture.alt


def test_map_takes_as_many_images_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    kept = plots._spread_over_classes(labels, 30)
    assert torch.bincount(labels[kept]).tolist() == [10, 3, 10]
    assert torch.equal(kept, kept.sort().values)
    assert kept[:10].tolist() == [*range(10)]


def test_map_by_principal_components():
    assert "PCA" in plots.embedding_picture(make_results(), method="pca").caption


def test_resampling_from_tensors():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 1, 4, 4)
    ood = OodSet(images, torch.tensor([0, 1, 1, 0, 1, 1]))
    result = resampling_result(
        "stage1", 5,
        SampleTensors(
            assignments=torch.tensor([0, 0, 1, 1, 1]), tailness=torch.tensor([0.2, 0.1, math.nan]),
            ood_indices=torch.tensor([5, 0, 2, 4]), ood_clusters=torch.tensor([0, 1, 0, 0]),
        ),
        ood=ood, labels=torch.tensor([0, 1, 1, -1, 1]), n_classes=2, seconds=1.5, n_thumbnails=2,
    )  # fmt: skip
    assert result.cluster_sizes == [2, 3, 0]
    assert result.budget == [3, 1, 0]
    assert result.cluster_classes == [[1, 1], [0, 2], [0, 0]]
    assert result.ood_classes == [{"B": 3}, {"A": 1}, {}]
    assert [row[:, 0, 0, 0].tolist() for row in result.thumbnails] == [[5, 2], [0], []]
    assert result.tailness[:2] == pytest.approx([0.2, 0.1])


def test_resampling_without_labels_or_clusters():
    result = resampling_result(
        "stage1", 0,
        SampleTensors(
            assignments=torch.tensor([0, 1]), tailness=torch.tensor([0.1, 0.2]),
            ood_indices=torch.tensor([1, 0]), ood_clusters=torch.tensor([-1, -1]),
        ),
        ood=OodSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([-1, -1])),
        labels=torch.tensor([-1, -1]), n_classes=2,
    )  # fmt: skip
    assert result.budget == [0, 0]
    assert result.cluster_classes is None
    assert result.ood_classes is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"assignments": torch.tensor([0, 2])}, r"assignments must be in \[0, 2\), got \[0, 2\]"),
        ({"ood_clusters": torch.tensor([0])}, r"ood_clusters must be of shape \[2\], got shape \(1,\)"),
        ({"ood_clusters": torch.tensor([0, 2])}, r"ood_clusters must be in \[-1, 2\), got \[0, 2\]"),
        ({"ood_indices": torch.tensor([0, 2])}, r"ood_indices must be in \[0, 2\), got \[0, 2\]"),
        ({"labels": torch.tensor([0, 3])}, r"labels must be in \[-1, 2\), got \[0, 3\]"),
        ({"labels": torch.tensor([0])}, r"labels must be of shape \[2\], got shape \(1,\)"),
    ],
)
def test_resampling_of_tensors_that_do_not_fit(changes, sentence):
    sample = {
        "assignments": torch.tensor([0, 1]), "tailness": torch.tensor([0.1, 0.2]),
        "ood_indices": torch.tensor([0, 1]), "ood_clusters": torch.tensor([0, 1]),
    }  # fmt: skip
    arguments = {
        "n_classes": 2, "labels": torch.tensor([0, 1]),
        "ood": OodSet(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1])),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^resampling_result: {sentence}$"):
        resampling_result(
            "stage1", 0, SampleTensors(**{key: changes.get(key, value) for key, value in sample.items()}),
            **{key: changes.get(key, value) for key, value in arguments.items()},
        )  # fmt: skip
