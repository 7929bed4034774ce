"""Sets whose files workers decode as they are used: the same images as from the decoded copy."""

import os

import pytest
import torch
from on_disk import greys, write_list

from ltood_fast.data import DataError, ImageFiles, Reader, image_files, load_data, open_set

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


@pytest.fixture
def streamed(monkeypatch):
    """Any set is large."""
    monkeypatch.setattr(image_files, "STREAMED_BYTES", 0)


@pytest.fixture
def files(tmp_path, save_image):
    """(images to be decoded, the decoded ones)."""
    paths = [save_image(tmp_path / f"{i}.png", 5 * i, (12, 9)) for i in range(11)]
    decoded = image_files.open_files(paths, 8, str(tmp_path / "cache"), "set", workers=0)
    return ImageFiles([str(path) for path in paths], 8, workers=2), decoded


@pytest.fixture
def no_decoding_here(monkeypatch):
    """Files can be decoded in other processes alone."""
    here, real = os.getpid(), image_files.decode_file

    def decode(file, size):
        assert os.getpid() != here
        return real(file, size)

    monkeypatch.setattr(image_files, "decode_file", decode)


def test_large_sets_are_streamed_and_small_ones_decoded_once(tmp_path, save_image, monkeypatch):
    paths = [save_image(tmp_path / "set" / f"{i}.png", 5 * i) for i in range(2)]

    def opened(workers):
        return open_set("folder:set", root=str(tmp_path), image_size=8, cache_dir=str(tmp_path), workers=workers).images

    monkeypatch.setattr(image_files, "STREAMED_BYTES", 2 * 3 * 8 * 8)
    assert isinstance(opened(1), torch.Tensor)
    monkeypatch.setattr(image_files, "STREAMED_BYTES", 2 * 3 * 8 * 8 - 1)
    assert isinstance(opened(0), torch.Tensor)
    assert isinstance(opened(1), ImageFiles)
    paths[0].unlink()
    with pytest.raises(DataError, match="image file must exist, got .*0.png"):
        image_files.open_files(paths, 8, "", "set", workers=1)


def test_files_stand_for_the_tensor_of_their_images(files):
    images, decoded = files
    assert (len(images), images.shape, images.dim(), images.dtype) == (11, decoded.shape, 4, torch.uint8)
    assert torch.equal(images.cpu(), decoded)
    assert torch.equal(images[3:9].cpu(), decoded[3:9])
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(images[rows].cpu(), decoded[rows])
    assert images[rows[:0]].cpu().shape == (0, 3, 8, 8)


def test_splitting_decodes_in_workers(files, no_decoding_here):
    images, decoded = files
    parts = list(images.split(4))
    assert [len(part) for part in parts] == [4, 4, 3]
    assert torch.equal(torch.cat(parts), decoded)


def test_a_reader_gives_expected_images_and_all_others_too(files, monkeypatch):
    images, decoded = files
    pool = 255 - decoded[:4]
    both, reader = torch.cat([decoded, pool]), Reader((images, pool))
    here, calls, real = os.getpid(), [], image_files.decode_file
    monkeypatch.setattr(image_files, "decode_file", lambda file, size: (calls.append(os.getpid()), real(file, size))[1])
    first, second, third = torch.tensor([12, 3, 0]), torch.tensor([14, 11]), torch.tensor([5, 13, 5, 1])
    for _ in range(2):  # epochs
        reader.expect([first, second, third])
        assert torch.equal(reader[first], both[first])
        assert torch.equal(reader[second], both[second])
        assert here not in calls
        assert torch.equal(reader[first], both[first])  # not expected now
        assert calls == [here, here]
        assert torch.equal(reader[third], both[third])
        calls.clear()
    reader.expect([first, second])
    reader.expect([third])  # an epoch that was broken off
    assert torch.equal(reader[third], both[third])
    assert not calls


def test_a_reader_of_tensors_needs_no_workers():
    parts = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1), torch.arange(5, 8, dtype=torch.uint8).view(3, 1, 1, 1)
    reader = Reader(parts)
    reader.expect([torch.tensor([1])])
    assert greys(reader[torch.tensor([7, 0, 5])]) == [7, 0, 5]
    assert reader.loader is None


def test_workers_leave_torchs_random_numbers_alone(files):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    list(files[0].split(4))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_broken_file_is_one_sentence(files, tmp_path):
    images, _ = files
    (tmp_path / "7.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="image file must be readable, got a broken one: .*7.png") as error:
        list(images.split(4))
    assert "\n" not in str(error.value)


def test_a_worker_that_dies_is_one_sentence(files, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(image_files, "decode_file", lambda file, size: os._exit(1))
    with pytest.raises(DataError, match="processes of data.workers must live as long as the run, got ") as error:
        list(files[0].split(4))
    assert "\n" not in str(error.value)


def test_sets_from_files_and_their_subsets(data_config, streamed, picture_root, tmp_path):
    lists = {
        "id_list": str(write_list(tmp_path / "id.txt", "train/dog/0.png 1", "train/cat/0.png 0", "train/cat/1.png 0")),
        "probe_list": str(write_list(tmp_path / "probe.txt", "train/cat/2.png 0", "train/dog/1.png 1")),
        "test_list": str(write_list(tmp_path / "test.txt", "test/cat/0.png 0", "test/dog/0.png 1")),
    }
    options = {"id": "list", "root": str(picture_root), "ood": "folder:train", "ood_size": 4, "workers": 1, **lists}
    data = load_data(data_config(**options, imbalance=2.0))
    whole = load_data(data_config(**{**options, "workers": 0}, imbalance=2.0))
    assert len(data.ood) == 4
    for name in ("train", "ood", "probe", "test"):
        mine, decoded = getattr(data, name), getattr(whole, name)
        assert isinstance(mine.images, ImageFiles)
        assert torch.equal(mine.images.cpu(), decoded.images)
        assert torch.equal(mine.labels, decoded.labels)


def test_colours_beside_grey_images_are_not_streamed(data_config, streamed, picture_root):
    with pytest.raises(DataError, match="data.workers must be 0 for a large OOD set in colour with grey ID images"):
        load_data(data_config(ood=f"folder:{picture_root}/train", workers=1))
