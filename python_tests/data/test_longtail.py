import numpy as np
import pytest
import torch

from ltood_fast.data import DataError, ImageSet
from ltood_fast.data.longtail import exponential_counts, make_long_tailed, read_split


def balanced(per_class, n_classes=5):
    """Classes in turn; image i holds the number i."""
    sizes = [per_class] * n_classes if isinstance(per_class, int) else per_class
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    images = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images, labels, tuple("abcdefghij"[: len(sizes)]), "set")


@pytest.mark.parametrize(("factor", "n_classes", "largest"), [(1, 10, 50), (10, 10, 50), (100, 10, 5000), (7.5, 3, 99)])
def test_counts_follow_the_formula(factor, n_classes, largest):
    counts = exponential_counts(largest, n_classes, factor)
    exact = [largest * factor ** (-c / (n_classes - 1)) for c in range(n_classes)]
    assert counts == [max(1, int(round(n, 6))) for n in exact]
    assert counts[0] == largest
    assert counts[-1] == int(round(largest / factor, 6))


def test_official_cifar10_lt_size():
    # CIFAR-10-LT of Cui et al. at factor 100: 12,406 images.
    assert exponential_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_a_single_class_and_a_steep_tail_keep_an_image():
    assert exponential_counts(7, 1, 10) == [7]
    assert exponential_counts(5, 3, 1000) == [5, 1, 1]


def test_long_tail_is_a_subset_in_order_and_repeats_by_seed():
    whole = balanced(40)
    tail = make_long_tailed(whole, 10, seed=3)
    assert tail.class_counts().tolist() == exponential_counts(40, 5, 10)
    rows = tail.images.flatten().long()
    assert torch.equal(rows, rows.unique())  # no image twice, order kept
    assert torch.equal(whole.labels[rows], tail.labels)
    assert torch.equal(make_long_tailed(whole, 10, seed=3).images, tail.images)
    assert not torch.equal(make_long_tailed(whole, 10, seed=4).images, tail.images)


def test_shuffled_classes_have_the_same_sizes_in_another_order():
    counts = [make_long_tailed(balanced(40), 10, s, "shuffled").class_counts().tolist() for s in range(4)]
    assert all(sorted(c, reverse=True) == exponential_counts(40, 5, 10) for c in counts)
    assert len(set(map(tuple, counts))) > 1


def test_uneven_classes_shrink_the_whole_curve_to_fit():
    tail = make_long_tailed(balanced([40, 12, 40, 40, 40]), 10, seed=0)
    counts = tail.class_counts().tolist()
    assert counts == exponential_counts(counts[0], 5, 10)
    assert counts[1] == 12  # the tightest class is used up


@pytest.mark.parametrize("factor", [0.5, -1, float("nan")])
def test_a_factor_below_one_is_refused(factor):
    with pytest.raises(DataError, match=f"imbalance must be at least 1, or 0 for the whole set, got {factor}"):
        make_long_tailed(balanced(4), factor, 0)


def test_an_empty_class_and_a_set_without_labels_are_refused():
    with pytest.raises(DataError, match="set must hold images of every class to be made long-tailed, got none of b"):
        make_long_tailed(balanced([4, 0, 4]), 10, 0)
    unlabelled = ImageSet(torch.zeros(3, 1, 1, 1, dtype=torch.uint8), torch.full((3,), -1), (), "set")
    with pytest.raises(DataError, match="got no labels"):
        make_long_tailed(unlabelled, 10, 0)


def test_a_split_is_read_in_its_order(tmp_path):
    np.save(tmp_path / "split.npy", np.array([5, 0, 3], np.int32))
    assert read_split(tmp_path / "split.npy", 6).tolist() == [5, 0, 3]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0, 6]), r"indices of split .* must be in \[0, 6\), got \[0, 6\]"),
        (np.array([-1, 2]), r"must be in \[0, 6\), got \[-1, 2\]"),
        (np.array([1, 2, 1]), "must be distinct, got 1 repeated"),
        (np.array([0.0, 1.0]), r"must be a vector of indices, got float64 \(2,\)"),
        (np.zeros((2, 2), int), r"must be a vector of indices, got int64 \(2, 2\)"),
        (np.array([], int), "must be a vector of indices"),
        (np.array([{}]), "must be a .npy array, got a damaged file"),  # a pickle is never loaded
    ],
)
def test_a_bad_split_is_refused(tmp_path, array, message):
    np.save(tmp_path / "split.npy", array)
    with pytest.raises(DataError, match=message):
        read_split(tmp_path / "split.npy", 6)


def test_a_split_that_is_no_array_is_refused(tmp_path):
    path = tmp_path / "split.npy"
    with pytest.raises(DataError, match="split must be an existing .npy file, got"):
        read_split(path, 6)
    for damaged in (b"", b"\x93NUMPY", b"PK\x03\x04 no archive", b"plain text"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="split must be a .npy array, got a damaged file"):
            read_split(path, 6)
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(2))
    with pytest.raises(DataError, match="split must be a .npy array, got a damaged file"):
        read_split(path, 6)
