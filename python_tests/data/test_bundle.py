from pathlib import Path

import numpy as np
import pytest
import torch
from on_disk import greys, write_list

from ltood_fast.data import DataError, load_data
from ltood_fast.data.bundle import with_channels
from ltood_fast.data.longtail import exponential_counts


@pytest.fixture
def list_config(data_config, picture_root, tmp_path):
    """The four lists over the miniature folders."""

    def make(**fields):
        train = [f"train/{name}/{i}.png {c}" for c, name in enumerate(("cat", "dog")) for i in range(3)]
        test = [f"test/{name}/0.png {c}" for c, name in enumerate(("cat", "dog"))]
        lists = {
            "id_list": write_list(tmp_path / "id.txt", *train[:4]),
            "probe_list": write_list(tmp_path / "probe.txt", *train),
            "test_list": write_list(tmp_path / "test.txt", *test),
            "ood_list": write_list(tmp_path / "ood.txt", *(line.split()[0] for line in train)),
        }
        return data_config(**{"id": "list", "ood": "list", "root": str(picture_root), **lists, **fields})

    return make


def test_the_embedded_default(data_config):
    data = load_data(data_config(imbalance=20.0, ood_size=50))
    assert data.train.class_counts().tolist() == exponential_counts(104, 10, 20)
    assert data.probe.class_counts().tolist() == [30] * 10
    assert data.test.class_counts().tolist() == [40] * 10
    assert len(data.ood) == 50
    assert data.ood.images.shape[1:] == data.train.images.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("imbalance", [0.0, 1.0])
def test_no_imbalance_leaves_the_set_as_it_is(data_config, imbalance):
    assert load_data(data_config(imbalance=imbalance, ood="")).train.class_counts().tolist() == [104] * 10


def test_the_order_of_the_classes_can_be_shuffled(data_config):
    counts = (
        load_data(data_config(imbalance=20.0, ood="", class_order="shuffled", seed=1)).train.class_counts().tolist()
    )
    assert counts != exponential_counts(104, 10, 20)
    assert sorted(counts, reverse=True) == exponential_counts(104, 10, 20)


def test_no_ood_set(data_config):
    assert load_data(data_config(ood="")).ood is None


def test_four_lists(list_config):
    data = load_data(list_config())
    assert data.train.class_counts().tolist() == [3, 1]
    assert greys(data.train.images) == [0, 10, 20, 30]
    assert data.probe.class_counts().tolist() == [3, 3]
    assert greys(data.test.images) == [200, 210]
    assert len(data.ood) == 6
    assert data.train.class_names == data.probe.class_names == data.test.class_names == ("cat", "dog")


def test_a_class_without_training_images_is_known_by_the_probe(list_config, tmp_path):
    data = load_data(list_config(id_list=write_list(tmp_path / "cats.txt", "train/cat/0.png 0")))
    assert data.train.class_counts().tolist() == [1, 0]
    assert data.train.class_names == ("cat", "dog")


@pytest.mark.parametrize("key", ["id_list", "probe_list", "test_list", "ood_list"])
def test_a_list_that_is_not_given_is_named(list_config, key):
    with pytest.raises(DataError, match=f"data.{key} must be the path of a list when data.(id|ood) is list, got none"):
        load_data(list_config(**{key: ""}))


def test_a_label_that_the_probe_does_not_know_is_refused(list_config, tmp_path):
    wrong = write_list(tmp_path / "wrong.txt", "test/cat/0.png 0", "test/dog/0.png 5")
    with pytest.raises(DataError, match="probe set must hold every class, got none of"):
        load_data(list_config(test_list=wrong))


def test_a_test_set_without_classes_or_labels_is_refused(list_config, tmp_path):
    with pytest.raises(DataError, match="test set must hold every class, got none of dog"):
        load_data(list_config(test_list=write_list(tmp_path / "t.txt", "test/cat/0.png 0")))
    half = write_list(tmp_path / "t.txt", "test/cat/0.png 0", "test/dog/0.png")
    with pytest.raises(DataError, match="list must label every image .*, got some without in .*t.txt"):
        load_data(list_config(test_list=half))


@pytest.mark.parametrize("key", ["id_list", "probe_list", "test_list"])
def test_classes_of_an_id_list_do_not_come_from_folders(list_config, tmp_path, key):
    bare = write_list(tmp_path / "bare.txt", "test/dog/0.png", "test/cat/0.png -1")
    with pytest.raises(DataError, match="list must label every image"):
        load_data(list_config(**{key: bare}))


def test_a_folder_with_its_parts(data_config, picture_root, tmp_path):
    data = load_data(data_config(id=f"folder:{picture_root}", ood=f"folder:{picture_root}/test", imbalance=3.0))
    assert data.train.class_counts().tolist() == [3, 1]
    assert data.probe.class_counts().tolist() == [3, 3]
    assert greys(data.test.images) == greys(data.ood.images) == [200, 210]
    (picture_root / "test").rename(picture_root / "val")
    assert greys(load_data(data_config(id=f"folder:{picture_root}", ood="")).test.images) == [200, 210]


def test_a_folder_relative_to_a_root_in_the_home(data_config, picture_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "split.npy", np.array([4, 0]))
    data = load_data(data_config(id="folder:pictures", root="~", split="split.npy", ood=""))
    assert greys(data.train.images) == [40, 0]


def test_parts_of_a_folder_must_hold_the_same_classes(data_config, picture_root, save_image):
    (picture_root / "test/cat").rename(picture_root / "test/bird")  # "dog" would be class 1 of both
    with pytest.raises(DataError, match="train and test in .* must hold the same classes, got bird, cat in one only"):
        load_data(data_config(id=f"folder:{picture_root}", ood=""))
    (picture_root / "test/bird").rename(picture_root / "test/cat")
    save_image(picture_root / "train/ant/0.png", 5)
    with pytest.raises(DataError, match="must hold the same classes, got ant in one only"):
        load_data(data_config(id=f"folder:{picture_root}", ood=""))


@pytest.mark.parametrize("part", ["train", "test"])
def test_images_of_a_part_lie_in_class_folders(data_config, picture_root, save_image, part):
    save_image(picture_root / part / "stray.png", 5)
    with pytest.raises(DataError, match=f"images of .*/{part} must lie in class folders, got some outside"):
        load_data(data_config(id=f"folder:{picture_root}", ood="", imbalance=3.0))


def test_a_folder_without_a_test_part_gets_one(data_config, picture_root):
    data = load_data(data_config(id=f"folder:{picture_root}/train", ood="", test_fraction=0.4))
    assert data.train.class_counts().tolist() == [2, 2]
    assert data.test.class_counts().tolist() == [1, 1]
    assert sorted(greys(data.train.images) + greys(data.test.images)) == [0, 10, 20, 30, 40, 50]
    assert {Path(file).parts[0] for file in data.test.files} == {"cat", "dog"}


def test_a_test_part_alone_is_refused(data_config, picture_root):
    (picture_root / "train").rename(picture_root / "training")
    with pytest.raises(DataError, match="must hold the folder train in addition to test, got test alone"):
        load_data(data_config(id=f"folder:{picture_root}", ood=""))


@pytest.mark.parametrize("spec", ["letters", "npy:a.npy", "list:a.txt"])
def test_a_pool_is_no_id_set(data_config, spec):
    with pytest.raises(DataError, match=f"data.id must be a set with a training and a test part, got '{spec}'"):
        load_data(data_config(id=spec))


def test_an_official_split_takes_its_rows(data_config, tmp_path):
    np.save(tmp_path / "split.npy", np.array([3, 500, 104]))
    data = load_data(data_config(ood="", root=str(tmp_path), split="split.npy"))
    assert data.train.labels.tolist() == [0, 4, 1]
    np.save(tmp_path / "split.npy", np.array([3, 1040]))
    with pytest.raises(DataError, match=r"indices of split .* must be in \[0, 1040\), got \[3, 1040\]"):
        load_data(data_config(ood="", root=str(tmp_path), split="split.npy"))


def test_the_pool_is_cut_to_its_size_by_seed(data_config, tmp_path):
    np.save(tmp_path / "pool.npy", np.arange(100, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2))

    def pool(**fields):
        return greys(load_data(data_config(ood="npy:pool.npy", ood_root=str(tmp_path), **fields)).ood.images)

    assert pool() == list(range(100))
    assert pool(ood_size=1000) == list(range(100))
    cut = pool(ood_size=10)
    assert len(set(cut)) == 10
    assert cut == sorted(cut) == pool(ood_size=10)
    assert cut != pool(ood_size=10, seed=1)


def test_the_pool_takes_the_colours_of_the_id_set(data_config, list_config, picture_root):
    grey = load_data(data_config(id="digits", ood=f"folder:{picture_root}/train")).ood
    assert grey.images.shape == (6, 1, 8, 8)
    assert greys(grey.images) == [0, 10, 20, 30, 40, 50]
    assert load_data(list_config(ood="letters", ood_size=5)).ood.images.shape == (5, 3, 8, 8)


def test_luma_weighs_green_most():
    colours = torch.zeros(3, 3, 1, 1, dtype=torch.uint8)
    colours[[0, 1, 2], [0, 1, 2]] = 255
    assert with_channels(colours, 1).flatten().tolist() == [76, 150, 29]
