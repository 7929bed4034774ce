import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from on_disk import greys, numbered, write_list

from ltood_fast.data import DataError, load_data, open_set
from ltood_fast.data.sources import read_list, resized
from ltood_fast.train.config import DataConfig


@pytest.fixture
def open_small(tmp_path):
    def open_it(spec, **options):
        return open_set(spec, image_size=8, cache_dir=str(tmp_path / "cache"), **options)

    return open_it


def test_an_unknown_kind_names_the_known_ones(open_small):
    with pytest.raises(DataError, match="set must be one of digits, letters, cifar10, .* got 'svhn'"):
        open_small("svhn")


def test_a_set_that_is_nearly_right_is_told_from_a_wrong_one(open_small, tmp_path):
    with pytest.raises(DataError, match="got 'cifar_10', did you mean cifar10"):
        open_small("cifar_10")
    with pytest.raises(DataError, match=f"which is a folder: did you mean folder:{tmp_path}"):
        open_small(str(tmp_path))
    with pytest.raises(DataError, match="set must be digits without a path, got 'digits:test'"):
        open_small("digits:test")
    with pytest.raises(DataError, match="set must be folder:PATH, got 'folder:'"):
        open_small("folder:")


# ---- folders


def test_class_folders_give_labels_in_order_of_name(open_small, picture_root):
    pictures = open_small(f"folder:{picture_root}/train")
    assert pictures.class_names == ("cat", "dog")
    assert pictures.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert greys(pictures.images) == [0, 10, 20, 30, 40, 50]


def test_a_folder_may_be_relative_to_the_root_and_classes_nested(open_small, picture_root, save_image):
    save_image(picture_root / "train/cat/images/deep.JPEG", 90, quality=100)
    pictures = open_small("folder:train", root=str(picture_root))
    assert pictures.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_flat_folder_is_unlabelled_and_other_files_stay(open_small, tmp_path, save_image):
    for i in range(3):
        save_image(tmp_path / "flat" / f"{i}.png", 10 * i)
    (tmp_path / "flat/readme.txt").write_text("no image")
    pool = open_small(f"folder:{tmp_path}/flat")
    assert pool.labels.tolist() == [-1, -1, -1]
    assert pool.class_names == ()


def test_a_class_folder_may_be_a_link(open_small, picture_root, tmp_path, save_image):
    save_image(tmp_path / "elsewhere/0.png", 90)
    (picture_root / "train/eel").symlink_to(tmp_path / "elsewhere")
    pictures = open_small(f"folder:{picture_root}/train")
    assert pictures.class_names == ("cat", "dog", "eel")
    assert greys(pictures.images)[-1] == 90


def test_the_home_is_expanded(open_small, picture_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_list(tmp_path / "list.txt", "cat/0.png 0")
    assert len(open_small("folder:pictures/test", root="~")) == len(open_small("folder:~/pictures/test")) == 2
    assert greys(open_small("list:~/list.txt", root="~/pictures/test").images) == [200]


def test_the_working_folder_has_a_name(open_small, picture_root, monkeypatch):
    monkeypatch.chdir(picture_root)
    assert open_small("folder:.").name == "pictures"


def test_a_missing_and_an_empty_folder_are_refused(open_small, tmp_path):
    with pytest.raises(DataError, match="folder must exist, got .*nowhere"):
        open_small(f"folder:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"folder must hold images \(.*\.webp\), got none below .*empty"):
        open_small(f"folder:{tmp_path}/empty")


# ---- lists


def test_a_list_keeps_its_order_and_names_classes_by_folder(open_small, picture_root, tmp_path):
    path = write_list(tmp_path / "list.txt", "train/dog/1.png 1", "", "train/cat/2.png 0", "train/dog/0.png 1")
    pictures = open_small(f"list:{path}", root=str(picture_root))
    assert greys(pictures.images) == [40, 20, 30]
    assert pictures.labels.tolist() == [1, 0, 1]
    assert pictures.class_names == ("cat", "dog")


def test_without_a_root_paths_are_relative_to_the_list(open_small, picture_root):
    path = write_list(picture_root / "list.txt", "test/cat/0.png 0")
    assert greys(open_small(f"list:{path}").images) == [200]


def test_absolute_paths_and_spaces_in_names(open_small, tmp_path, save_image):
    image = save_image(tmp_path / "two words" / "my picture.png", 70)
    pictures = open_small(f"list:{write_list(tmp_path / 'a.txt', f'{image} 0', str(image))}", root="/elsewhere")
    assert greys(pictures.images) == [70, 70]
    assert pictures.labels.tolist() == [0, -1]


def test_classes_that_folders_do_not_tell_apart_go_by_number(open_small, picture_root, tmp_path):
    path = write_list(tmp_path / "list.txt", "train/cat/0.png 0", "train/cat/1.png 2")
    assert open_small(f"list:{path}", root=str(picture_root)).class_names == ("0", "1", "2")


@pytest.mark.parametrize("label", ["", " -1"])
def test_folders_label_an_unlabelled_pool_for_the_report(open_small, tmp_path, save_image, label):
    # Tiny-ImageNet's layout
    for wnid in ("n02", "n01"):
        save_image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG", 50)
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn09\tother\n")
    lines = [f"train/{wnid}/images/{wnid}_0.JPEG{label}" for wnid in ("n02", "n01")]
    pool = open_small(f"list:{write_list(tmp_path / 'ood.txt', *lines)}", root=str(tmp_path))
    assert pool.labels.tolist() == [1, 0]
    assert pool.class_names == ("n01 goldfish", "n02")


@pytest.mark.parametrize(
    ("line", "number"),
    [
        *((f"train/cat/0.png {label}", 2) for label in ("cat", "-2", "1e3x", "1.5", "1_0", "1000000", "9" * 30)),
        ("two words", 2),
    ],
)
def test_a_malformed_line_is_named_by_number(tmp_path, line, number):
    path = write_list(tmp_path / "list.txt", "train/dog/0.png 1", line)
    with pytest.raises(DataError, match=f"line {number} of .*list.txt must be `path label`, label in .*, got '{line}'"):
        read_list(path)


def test_a_missing_an_empty_and_a_binary_list_are_refused(open_small, tmp_path):
    with pytest.raises(DataError, match="list must be an existing file, got .*nowhere.txt"):
        open_small(f"list:{tmp_path}/nowhere.txt")
    with pytest.raises(DataError, match="set must be list:PATH, got 'list'"):
        open_small("list")
    with pytest.raises(DataError, match="list must name at least one image, got an empty file"):
        open_small(f"list:{write_list(tmp_path / 'empty.txt', '')}")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="list must be a text of lines `path label` in UTF-8, got .*binary.txt"):
        open_small(f"list:{tmp_path}/binary.txt")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("make", "got"),
    [
        (make_pipe, "must be a regular file, got a named pipe: "),
        (Path.mkdir, "must be a regular file, got a folder: "),
        (lambda path: path.symlink_to("/dev/zero"), "must be a regular file, got a device: "),
        (lambda path: path.symlink_to(path), "must be readable, got "),
        (lambda path: None, "must exist, got "),
    ],
)
def test_what_is_no_file_is_named_with_its_line(make, got, workers, open_small, picture_root, monkeypatch):
    monkeypatch.setattr("ltood_fast.data.image_files.STREAMED_BYTES", 0)
    make(picture_root / "odd.png")
    path = write_list(picture_root / "list.txt", "train/cat/0.png 0", "", "odd.png 1")
    with pytest.raises(DataError) as error:
        open_small(f"list:{path}", workers=workers)
    assert f"image file {got}" in str(error.value)
    assert str(picture_root / "odd.png") in str(error.value)
    assert str(error.value).endswith(f" (line 3 of {path})")


def test_a_broken_image_of_a_list_is_named_with_its_line(open_small, picture_root):
    (picture_root / "odd.png").write_bytes(b"no picture")
    path = write_list(picture_root / "list.txt", "train/cat/0.png 0", "odd.png 1")
    with pytest.raises(DataError, match=r"got a broken one: .*odd.png .* \(line 2 of .*list.txt\)"):
        open_small(f"list:{path}")


def test_a_path_out_of_the_root_is_named_with_its_line(open_small, picture_root, tmp_path, save_image):
    save_image(tmp_path / "outside.png", 7)
    inside = "train/../train/cat/0.png 0"
    path = write_list(tmp_path / "list.txt", inside, "train/../../outside.png 1")
    with pytest.raises(
        DataError, match=r"must lie below the root .*pictures, got train/\.\./\.\./outside.png \(line 2 of"
    ):
        open_small(f"list:{path}", root=str(picture_root))
    assert greys(open_small(f"list:{write_list(path, inside)}", root=str(picture_root)).images) == [0]


def test_a_nul_byte_is_named(open_small, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png 0\nb\0.png 1\n")
    with pytest.raises(DataError, match=r"line 2 of .*list.txt must be a path without a NUL byte, got 'b\\x00.png 1'"):
        open_small(f"list:{tmp_path}/list.txt")
    for spec in ("folder:a\0b", "npy:a\0b", "list:a\0b", "cifar10:a\0b"):
        with pytest.raises(DataError, match=r"path must not hold a NUL byte, got 'a\\x00b'"):
            open_small(spec)


def test_a_home_of_nobody_is_named(open_small):
    with pytest.raises(DataError, match="got ~nobody_of_that_name/x"):
        open_small("folder:~nobody_of_that_name/x")


@pytest.mark.parametrize(
    "make", [make_pipe, Path.mkdir, lambda path: path.write_bytes(b"\x93NUMPY\x01\0v\0" + b"(" * 200)]
)
def test_a_npy_set_that_is_none_is_named(make, open_small, tmp_path):
    make(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"npy set must be .*a.npy"):
        open_small(f"npy:{tmp_path}/a.npy")


def test_lists_of_other_editors(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffa b.png\t3\r\n \r\n  c\x0cd.png  \r\ne.JPEG 0".encode())
    assert read_list(path) == ([Path("a b.png"), Path("c\x0cd.png"), Path("e.JPEG")], [3, -1, 0])


def test_labels_with_a_large_gap_are_questioned(tmp_path):
    path = write_list(tmp_path / "list.txt", "a.png 0", "b.png 900000", "c.png")
    with pytest.raises(DataError, match="got 2 different ones up to 900000, which would be 900001 classes; renumber"):
        read_list(path)
    few = write_list(tmp_path / "few.txt", "a.png 0", "b.png 900")  # a few images of ImageNet
    assert read_list(few)[1] == [0, 900]


def test_a_listed_image_that_is_missing_is_named(open_small, picture_root, tmp_path):
    path = write_list(tmp_path / "list.txt", "train/cat/9.png 0")
    with pytest.raises(DataError, match="image file must exist, got .*train/cat/9.png"):
        open_small(f"list:{path}", root=str(picture_root))


# ---- .npy arrays


def test_an_array_of_images_is_mapped_not_read(open_small, tmp_path):
    array = numbered(6, 8, 8, 3)
    np.save(tmp_path / "random_images.npy", array)
    pool = open_small("npy:random_images.npy", root=str(tmp_path))
    assert np.array_equal(pool.images.permute(0, 2, 3, 1).numpy(), array)
    assert pool.labels.tolist() == [-1] * 6
    pool.images.zero_()  # copy-on-write: the file stays as it was
    assert np.array_equal(np.load(tmp_path / "random_images.npy"), array)
    changed = np.load(tmp_path / "random_images.npy", mmap_mode="r+")
    mapped = open_small("npy:random_images.npy", root=str(tmp_path))
    changed[3] = 17
    changed.flush()
    assert int(mapped.images[3, 0, 5, 5]) == 17  # only a mapped file shows that


def test_a_grey_array_has_one_channel(open_small, tmp_path):
    np.save(tmp_path / "grey.npy", numbered(4, 8, 8))
    assert open_small(f"npy:{tmp_path}/grey.npy").images.shape == (4, 1, 8, 8)


def test_arrays_of_another_size_are_resized(open_small, tmp_path):
    np.save(tmp_path / "large.npy", np.full((4, 16, 16, 3), 9, np.uint8))
    images = open_small(f"npy:{tmp_path}/large.npy").images
    assert images.shape == (4, 3, 8, 8)
    assert (images == 9).all()


def test_resizing_averages_and_does_not_depend_on_the_chunk():
    images = torch.from_numpy(numbered(7, 3, 16, 16))
    half = resized(images, 8)
    assert torch.equal(half, resized(images, 8, chunk=2))
    assert abs(float(half.float().mean()) - float(images.float().mean())) < 2
    assert resized(images, 16) is images


def test_oblong_images_keep_their_proportions():
    images = torch.zeros(2, 3, 4, 12, dtype=torch.uint8)
    images[..., 4:8] = 200
    assert resized(images, 4).unique().tolist() == [200]
    assert resized(images, 8).unique().tolist() == [200]
    assert torch.equal(resized(images.mT, 8), resized(images, 8))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"must hold uint8 images \[N, H, W, C\], got float32 \(2, 8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"must hold uint8 images \[N, H, W, C\], got uint8 \(2, 3, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"must hold uint8 images \[N, H, W, C\], got uint8 \(0, 8, 8, 3\)"),
        (np.zeros((2, 64), np.uint8), r"must hold uint8 images \[N, H, W, C\], got uint8 \(2, 64\)"),
    ],
)
def test_an_array_that_holds_no_images_is_refused(open_small, tmp_path, array, message):
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(DataError, match=message):
        open_small(f"npy:{tmp_path}/array.npy")


def test_a_missing_and_a_cut_off_array_are_refused(open_small, tmp_path):
    with pytest.raises(DataError, match="npy set must be an existing .npy file, got .*array.npy"):
        open_small(f"npy:{tmp_path}/array.npy")
    np.save(tmp_path / "array.npy", numbered(6, 8, 8, 3))
    (tmp_path / "array.npy").write_bytes((tmp_path / "array.npy").read_bytes()[:500])
    with pytest.raises(DataError, match="npy set must be a .npy array, got a damaged file"):
        open_small(f"npy:{tmp_path}/array.npy")


# ---- CIFAR as torchvision stores it


def test_cifar10_as_torchvision_stores_it(cifar_root):
    train = open_set("cifar10", root=str(cifar_root), image_size=32)
    assert train.images.shape == (10, 3, 32, 32)
    assert train.images[:, 0, 0, 0].tolist() == list(range(10))
    assert train.labels.tolist() == list(range(10))
    assert train.class_names == tuple("abcdefghij")
    assert len(open_set("cifar10", root=str(cifar_root), part="test", image_size=32)) == 3
    assert open_set("cifar10", root=str(cifar_root), image_size=16).images.shape == (10, 3, 16, 16)


def test_cifar100_has_a_hundred_fine_classes(cifar_root):
    test = open_set("cifar100", root=str(cifar_root), part="test")
    assert test.labels.tolist() == [0, 1, 99]
    assert len(test.class_names) == 100


def test_cifar_that_is_not_there_is_refused_and_not_downloaded(tmp_path):
    message = "data.root must hold cifar10 as torchvision stores it, got .*; download it once with python -c"
    with pytest.raises(DataError, match=message):
        open_set("cifar10", root=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_torchvision_cifar_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match="cifar10 needs torchvision, which cannot be imported with this torch"):
        open_set("cifar10")


def test_noise_is_a_pool_of_its_own():
    images = open_set("noise", image_size=8, limit=30, seed=1)
    assert images.images.shape == (30, 3, 8, 8)
    assert images.images.float().std() > 60  # uniform: 74
    assert (images.labels == -1).all()
    assert torch.equal(open_set("noise", image_size=8, limit=30, seed=1).images, images.images)
    assert not torch.equal(open_set("noise", image_size=8, limit=30, seed=2).images, images.images)
    with pytest.raises(DataError, match="must be a set with a training and a test part, got 'noise'"):
        load_data(DataConfig(id="noise"))
