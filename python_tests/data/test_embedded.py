import matplotlib
import pytest
import torch

from ltood_fast.data import DataError
from ltood_fast.data.embedded import ALPHABET, digits, letters

PARTS = {"train": 104, "probe": 30, "test": 40}  # images a class


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_the_digits_is_balanced(part):
    part_of_digits = digits(8, part)
    assert part_of_digits.class_counts().tolist() == [PARTS[part]] * 10
    assert part_of_digits.images.shape[1:] == (1, 8, 8)


def test_no_digit_is_in_two_parts():
    from sklearn.datasets import load_digits

    rows = [image.tobytes() for part in PARTS for image in digits(8, part).images.numpy()]
    originals = load_digits().images
    assert len(set(rows)) == len(rows) == 1740
    assert len({image.tobytes() for image in originals}) == len(originals)  # so equal bytes mean the same image


def test_digits_keep_their_labels_and_grey_levels():
    from sklearn.datasets import load_digits

    data, test = load_digits(), digits(8, "test")
    label_of = {
        (image * 255 / 16).round().astype("uint8").tobytes(): t
        for image, t in zip(data.images, data.target, strict=True)
    }
    assert [label_of[image.tobytes()] for image in test.images.numpy()] == test.labels.tolist()


@pytest.mark.parametrize("size", [8, 16, 32])
def test_digits_and_letters_come_in_the_size_asked_for(size):
    assert digits(size, "test").images.shape == (400, 1, size, size)
    assert letters(size, 20).images.shape == (20, 1, size, size)


def test_letters_repeat_by_seed_and_differ_between_seeds():
    first = letters(16, 50, seed=1)
    assert torch.equal(first.images, letters(16, 50, seed=1).images)
    assert not torch.equal(first.images, letters(16, 50, seed=2).images)
    assert first.class_names == tuple(ALPHABET)
    assert len(ALPHABET) == 52


def test_two_letters_of_one_class_differ_and_none_is_blank():
    pool = letters(8, 1000)
    assert len({image.tobytes() for image in pool.images.numpy()}) > 990
    assert int(pool.images.flatten(1).max(1).values.min()) > 100
    assert int((pool.class_counts() == 0).sum()) == 0


def test_letters_look_as_digits_do_in_ink():
    ink = [s.images.float().mean() for s in (letters(8, 1000), digits(8, "probe"))]
    assert 0.5 < ink[0] / ink[1] < 1.5


def test_letters_are_drawn_as_labelled():
    # A capital I is a bar: upright, ink in the middle columns. A capital O has a hole there.
    pool = letters(8, 4000)

    def middle(letter):
        images = pool.images[pool.labels == ALPHABET.index(letter)].float()
        return float(images[:, :, 3:5, 3:5].mean() / images.mean())

    assert middle("I") > 2
    assert middle("O") < 1


def test_missing_fonts_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="letters need the fonts that matplotlib ships, got none in"):
        letters(8, 4)
