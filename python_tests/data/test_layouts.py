"""Every data set as it lies on a disk: miniatures of the unpacked archives, under lists and splits in the form of those
that SDCLR and COLT publish."""

import dataclasses

import numpy as np
import pytest
from on_disk import greys, numbered, write_batch, write_list

from ltood_fast.data import DataError, load_data, open_set
from ltood_fast.train.config import load_config


@pytest.fixture
def official(tmp_path, save_image, monkeypatch):
    """Lists below the working folder and the images that they name below `root`, each of another grey; returns the
    preset's DataConfig at 8 pixels."""

    def make(preset, lists, pool=()):
        config = load_config(preset).data
        number = 0
        for key, lines in lists.items():
            path = tmp_path / getattr(config, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_list(path, *lines)
            for line in lines:
                save_image(tmp_path / "root" / line.split()[0], 10 * number, (12, 8), quality=100)
                number += 1
        for name in pool:
            save_image(tmp_path / "pools" / name, 10 * number, (8, 10), quality=100)
            number += 1
        monkeypatch.chdir(tmp_path)
        places = {"root": str(tmp_path / "root"), "ood_root": str(tmp_path / "pools")}
        return dataclasses.replace(config, image_size=8, cache_dir=str(tmp_path / "cache"), **places)

    return make


IMAGENET = {
    "id_list": ["train/n02869837/n02869837_7193.JPEG 0", "train/n02869837/n02869837_29556.JPEG 0",
                "train/n01558993/n01558993_3.JPEG 1"],
    "probe_list": ["train/n01558993/n01558993_9337.JPEG 1", "train/n02869837/n02869837_5.JPEG 0"],
    "test_list": ["val/n02869837/ILSVRC2012_val_00022186.JPEG 0", "val/n01558993/ILSVRC2012_val_00012651.JPEG 1"],
}  # fmt: skip


@pytest.mark.parametrize("preset", ["imagenet100_lt", "imagenet_lt"])
def test_imagenet_lists_and_imagenet_r(official, tmp_path, preset):
    config = official(preset, IMAGENET, ["imagenet-r/n01443537/art_0.jpg", "imagenet-r/n01443537/sketch_8.jpg",
                                         "imagenet-r/n02113624/misc_1.jpg"])  # fmt: skip
    (tmp_path / "pools/imagenet-r/README.txt").write_text("in the archive as well")
    data = load_data(config)
    assert (greys(data.train.images), data.train.labels.tolist()) == ([0, 10, 20], [0, 0, 1])
    assert (greys(data.probe.images), data.probe.labels.tolist()) == ([30, 40], [1, 0])
    assert (greys(data.test.images), data.test.labels.tolist()) == ([50, 60], [0, 1])
    assert data.train.class_names == ("n02869837", "n01558993")  # a label's name, not the folders' order
    assert (greys(data.ood.images), data.ood.labels.tolist()) == ([70, 80, 90], [0, 0, 1])
    assert data.ood.class_names == ("n01443537", "n02113624")


def test_colts_list_of_imagenet_r_keeps_imagenets_labels(tmp_path, save_image):
    lines = ["n02113624/sketch_8.jpg 265", "n01443537/art_0.jpg 1"]
    for number, line in enumerate(lines):
        save_image(tmp_path / "imagenet-r" / line.split()[0], 10 * number, quality=100)
    path = write_list(tmp_path / "imagenet-r.txt", *lines)
    pool = open_set(f"list:{path}", root=str(tmp_path / "imagenet-r"), image_size=8, cache_dir=str(tmp_path))
    assert (greys(pool.images), pool.labels.tolist(), len(pool.class_names)) == ([0, 10], [265, 1], 266)


PLACES = {
    "id_list": ["train/airfield/00004851.jpg 0", "train/apartment_building-outdoor/00000794.jpg 1",
                "train/airfield/00004596.jpg 0"],
    "probe_list": ["train/airfield/00002049.jpg 0", "train/apartment_building-outdoor/00000672.jpg 1"],
    "test_list": ["val/apartment_building-outdoor/Places365_val_00027944.jpg 1",
                  "val/airfield/Places365_val_00003597.jpg 0"],
}  # fmt: skip
EXTRA = ["p/podium/indoor/00000001.jpg", "p/podium/outdoor/00000001.jpg", "t/toll_plaza/00000002.jpg"]


@pytest.mark.parametrize("folder", ["data_256_extra", "data_large_extra"])
def test_places_lists_and_places_extra69(official, folder):
    data = load_data(official("places_lt", PLACES, [f"{folder}/{name}" for name in EXTRA]))
    assert (greys(data.train.images), data.train.labels.tolist()) == ([0, 10, 20], [0, 1, 0])
    assert (greys(data.test.images), data.test.labels.tolist()) == ([50, 60], [1, 0])
    assert data.train.class_names == ("airfield", "apartment_building-outdoor")
    assert greys(data.ood.images) == [70, 80, 90]
    assert data.ood.class_names == ("podium/indoor", "podium/outdoor", "toll_plaza")  # not the initials p and t


@pytest.mark.parametrize("labels", [("67", "0", "63"), ("", "", "")])
def test_places_own_lists_begin_with_a_slash(tmp_path, save_image, labels):
    for number, name in enumerate(EXTRA):
        save_image(tmp_path / "data_256_extra" / name, 10 * number, quality=100)
    lines = [f"/{EXTRA[i]} {label}".strip() for i, label in zip((1, 2, 0), labels, strict=True)]
    path = write_list(tmp_path / "imglist_extra_train.txt", *lines)
    pool = open_set(
        f"list:{path}", root=str(tmp_path / "data_256_extra"), image_size=8, cache_dir=str(tmp_path / "cache")
    )
    assert greys(pool.images) == [10, 20, 0]
    assert [pool.class_names[label] for label in pool.labels] == (
        ["podium/outdoor", "toll_plaza", "podium/indoor"] if not labels[0] else list(labels)
    )


def test_folders_of_one_letter_are_classes_except_in_places(tmp_path, save_image):
    for name in ("a/abc/0.png", "b/0.png"):
        save_image(tmp_path / "letters" / name, 10)
    letters = open_set(f"folder:{tmp_path}/letters", image_size=8, cache_dir=str(tmp_path / "cache"))
    assert letters.class_names == ("a", "b")
    for name in ("cat/cats/0.png", "dog/dogs/0.png"):
        save_image(tmp_path / "animals" / name, 10)
    animals = open_set(f"folder:{tmp_path}/animals", image_size=8, cache_dir=str(tmp_path / "cache"))
    assert animals.class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["random_images", "imagenet_r", "places_extra69"])
def test_a_pool_that_is_not_there_says_where_to_find_it(data_config, tmp_path, name):
    with pytest.raises(DataError, match="must lie in .*, got nothing there; download it once from http"):
        load_data(data_config(ood=name, root=str(tmp_path)))
    with pytest.raises(DataError, match="must lie in .*elsewhere, got nothing there"):
        load_data(data_config(ood=f"{name}:elsewhere", root=str(tmp_path)))
    with pytest.raises(DataError, match="data.id must be a set with a training and a test part"):
        load_data(data_config(id=name, root=str(tmp_path)))


def test_cifar_with_official_splits_and_the_300k_random_images(cifar_root):
    np.save(cifar_root / "300K_random_images.npy", numbered(7, 32, 32, 3))  # uint8 [300000, 32, 32, 3] there
    np.save(cifar_root / "D_i.npy", np.array([7, 2, 5]))  # as published: int64, distinct, in no order
    np.save(cifar_root / "trainIdxList.npy", np.arange(10)[::-1])
    write_batch(cifar_root / "cifar-10-batches-py/test_batch", numbered(10, 32, 32, 3), "labels", list(range(10)))
    for part in ("train", "test"):
        images = numbered(100, 32, 32, 3)
        write_batch(cifar_root / "cifar-100-python" / part, images, "fine_labels", list(range(100))[::-1])
    splits = {"data.split": "D_i.npy", "data.root": str(cifar_root)}
    ten = load_data(load_config("cifar10_lt", {**splits, "data.probe_split": "trainIdxList.npy"}).data)
    assert (greys(ten.train.images), ten.train.labels.tolist()) == ([7, 2, 5], [7, 2, 5])
    assert ten.probe.labels.tolist() == list(range(10))[::-1]
    assert ten.labelled.labels.tolist() == list(range(10))  # the rows of a few-shot split are of the whole part
    assert (greys(ten.ood.images), ten.ood.images.shape) == (list(range(7)), (7, 3, 32, 32))
    hundred = load_data(load_config("cifar100_lt", splits).data)
    assert (greys(hundred.train.images), hundred.train.labels.tolist()) == ([7, 2, 5], [92, 97, 94])
    assert (len(hundred.probe), len(hundred.test), len(hundred.train.class_names)) == (100, 100, 100)
