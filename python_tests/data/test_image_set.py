import pytest
import torch

from ltood_fast.data import DataError, ImageSet


def make(n=4, labels=(0, 1, 1, -1), names=("a", "b")):
    return ImageSet(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1), torch.tensor(labels), names, "set")


def test_subset_keeps_the_order_of_the_rows():
    part = make().subset(torch.tensor([2, 0]))
    assert part.images.flatten().tolist() == [2, 0]
    assert part.labels.tolist() == [1, 0]
    assert len(part) == 2
    assert part.class_names == ("a", "b")


def test_class_counts_skip_unlabelled_rows_not_empty_classes():
    assert make(names=("a", "b", "c")).class_counts().tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), [0, 0], "images of set must be uint8 .N, C, H, W., got torch.float32"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 0], "must be uint8 .N, C, H, W., got torch.uint8 .2, 4, 4."),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), [], "set must hold at least one image, got none"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0], "labels of set must be 2, one an image, got .1,."),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 2], r"labels of set must be in \[-1, 2\), got \[0, 2\]"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, -2], r"labels of set must be in \[-1, 2\), got \[-2, 0\]"),
    ],
)
def test_what_is_no_image_set_is_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        ImageSet(images, torch.tensor(labels, dtype=torch.int64), ("a", "b"), "set")
