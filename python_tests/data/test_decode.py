import contextlib
import errno
import multiprocessing
import os
import queue
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ltood_fast.data import DataError, decode
from ltood_fast.data.decode import decode_file, decode_files


@pytest.fixture
def files(tmp_path, save_image):
    return [save_image(tmp_path / f"{i}.png", 2 * i) for i in range(100)]  # more than one chunk of work


@pytest.fixture
def count_decodes(monkeypatch):
    """The files that were decoded since."""
    seen = []

    def counting(file, image_size):
        seen.append(file)
        return decode_file(file, image_size)

    monkeypatch.setattr(decode, "decode_file", counting)
    return seen


def greys(images):
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def one_cache_file(folder):
    (path,) = folder.iterdir()  # and no partial file beside it
    return path


def test_files_come_in_order_and_the_cache_serves_the_next_call(files, tmp_path, count_decodes):
    cache = str(tmp_path / "cache")
    first = decode_files(files, 8, cache, "set")
    assert first.shape == (100, 3, 8, 8)
    assert first.dtype == torch.uint8
    assert greys(first) == [2 * i for i in range(100)]
    assert len(count_decodes) == 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = decode_files(files, 8, cache, "set")
    assert len(count_decodes) == 100
    assert torch.equal(first, again)
    assert np.array_equal(np.load(one_cache_file(tmp_path / "cache")), first.numpy())  # plain .npy for other tools


def test_changing_cached_images_leaves_the_cache_alone(files, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "IN_MEMORY_BYTES", 0)  # mapped
    first = decode_files(files, 8, str(tmp_path / "cache"))
    expected = first.clone()
    first.zero_()
    assert torch.equal(decode_files(files, 8, str(tmp_path / "cache")), expected)


@pytest.mark.parametrize("change", ["content", "size", "order"])
def test_other_files_or_sizes_are_decoded_again(files, tmp_path, save_image, count_decodes, change):
    cache, size = str(tmp_path / "cache"), 8
    decode_files(files, 8, cache)
    if change == "content":
        save_image(files[3], 77)
        os.utime(files[3], ns=(1, 1))
    elif change == "order":
        files = files[::-1]
    else:
        size = 4
    images = decode_files(files, size, cache)
    assert len(count_decodes) == 200
    assert images.shape[-1] == size
    if change == "content":
        assert greys(images)[3] == 77
    if change == "order":
        assert greys(images)[0] == 198


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:3000])


def cut_off_the_seal(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def other_shape(path):
    np.save(path, np.zeros((100, 3, 4, 4), np.uint8))


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


DAMAGES = [flip_a_bit, cut_off, cut_off_the_seal, empty, other_shape, archive]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_cache_is_made_again_with_one_warning(files, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = decode_files(files, 8, str(cache))
    damage(one_cache_file(cache))
    with pytest.warns(UserWarning, match="cache file .* is damaged .* and is made again") as caught:
        assert torch.equal(decode_files(files, 8, str(cache)), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode_files(files, 8, str(cache)), expected)


@pytest.mark.parametrize("mapped", [False, True])
def test_the_cache_of_other_images_is_made_again(files, tmp_path, monkeypatch, mapped):
    if mapped:  # no checksum there, but the fingerprint
        monkeypatch.setattr(decode, "IN_MEMORY_BYTES", 0)
    expected = decode_files(files, 8, str(tmp_path / "mine")).clone()
    decode_files(files[::-1], 8, str(tmp_path / "theirs"))
    shutil.copy(one_cache_file(tmp_path / "theirs"), one_cache_file(tmp_path / "mine"))
    with pytest.warns(UserWarning, match="its seal is wrong"):
        assert torch.equal(decode_files(files, 8, str(tmp_path / "mine")), expected)


def test_processes_that_want_the_same_files_decode_them_once(files, tmp_path, monkeypatch):
    """Forked while one decodes: they wait for it, then read what it made, and would fail if they decoded themselves."""
    cache, context = tmp_path / "cache", multiprocessing.get_context("fork")
    made = context.Queue()

    def other():
        monkeypatch.setattr(decode, "_decode_all", None)
        made.put(greys(decode_files(files, 8, str(cache)))[99])

    def fork(files, image_size, out, name):
        others.extend(context.Process(target=other, daemon=True) for _ in range(2))
        for process in others:
            process.start()
        with pytest.raises(queue.Empty):
            made.get(timeout=0.3)
        decode_all(files, image_size, out, name)

    others, decode_all = [], decode._decode_all
    monkeypatch.setattr(decode, "_decode_all", fork)
    decode_files(files, 8, str(cache))
    assert [made.get(timeout=30) for _ in others] == [198, 198]
    for process in others:
        process.join(30)
    one_cache_file(cache)


def test_a_full_disk_costs_the_cache_and_nothing_else(files, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="set is decoded but not cached: No space left on device") as caught:
        images = decode_files(files, 8, str(tmp_path / "cache"), "set")
    assert len(caught) == 1
    assert greys(images)[:3] == [0, 2, 4]
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_folder_that_cannot_be_made_costs_only_the_cache(files, tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.warns(UserWarning, match="not cached"):
        assert greys(decode_files(files, 8, str(tmp_path / "cache")))[1] == 2


def test_without_a_folder_the_users_cache_is_taken(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    decode_files(files, 8, "", "set")
    assert one_cache_file(tmp_path / "home/ltood_fast").name.startswith("set-")


def test_a_broken_image_is_named_and_leaves_no_cache(files, tmp_path):
    files[70].write_bytes(files[70].read_bytes()[:40])
    with pytest.raises(DataError, match="image file must be readable, got a broken one: .*70.png"):
        decode_files(files, 8, str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_a_missing_image_is_named(files, tmp_path):
    files[5].unlink()
    with pytest.raises(DataError, match="image file must exist, got .*5.png"):
        decode_files(files, 8, str(tmp_path / "cache"))


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("not an image")
    with pytest.raises(DataError, match="got a broken one: .*notes.jpg"):
        decode_file(path, 8)


def test_other_shapes_are_scaled_by_the_shorter_side_and_cropped(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200  # the centre square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    decoded = decode_file(tmp_path / "wide.png", 10)
    assert decoded.shape == (3, 10, 10)
    assert (abs(decoded[:, :, 1:-1].astype(int) - 200) <= 5).all()  # bicubic overshoots beside the edge


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert (decode_file(path, 8) >= 250).all()
    assert decode_file(path, 8).shape == (3, 8, 8)


def test_sixteen_bits_are_scaled_and_thirty_two_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 90 << 8, np.uint16)).save(tmp_path / "deep.png")
    assert (decode_file(tmp_path / "deep.png", 4) == 90).all()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match="got a broken one: .*float.tiff .32 bits a channel"):
        decode_file(tmp_path / "float.tiff", 4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tiff"])
@pytest.mark.parametrize("kept", [0, 12, 0.5])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_every_format_cut_off_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(DataError, match=f"image file must be readable, got a broken one: .*cut.{suffix}"):
        decode_file(path, 8)


def test_a_picture_that_is_another_format_starts_no_program(tmp_path, monkeypatch):
    """Pillow opens EPS by its content and runs the first `gs` on PATH."""
    started = tmp_path / "started"
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    file = tmp_path / "cat.jpg"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"got a broken one: .*cat.jpg \(its content is none of JPEG, PNG"):
        decode_file(file, 8)
    assert not started.exists()


@pytest.mark.parametrize("name", ["ICO", "TGA", "PCX", "SGI", "MSP"])
def test_formats_that_are_not_named_are_refused(name, tmp_path):
    file = tmp_path / "cat.png"
    Image.new("1" if name == "MSP" else "RGB", (16, 16)).save(file, format=name)
    with pytest.raises(DataError, match="its content is none of"):
        decode_file(file, 8)


@pytest.mark.parametrize("name", decode.FORMATS)
def test_the_named_formats_are_read_whatever_the_suffix(name, tmp_path):
    file = tmp_path / "cat.img"
    Image.new("RGB", (8, 8), (200, 200, 200)).save(file, format=name)
    assert abs(int(decode_file(file, 8)[0, 0, 0]) - 200) <= 2


@pytest.mark.parametrize("side", [8193, 13_000])
def test_a_bomb_is_one_sentence_before_it_is_decoded(side, tmp_path, recwarn):
    """13,000 x 13,000 is below Pillow's limit: 676 MB of a file of 21 kB (1 bit a pixel)."""
    file = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(file)
    with pytest.raises(DataError) as error:
        decode_files([file], 8, str(tmp_path / "cache"))
    assert str(error.value).startswith(
        f"data: image file must have at most {1 << 26} pixels, got {side} x {side}: {file}"
    )
    assert not recwarn.list


def test_an_image_of_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 16 * 9)
    for size, fits in (((16, 9), True), ((16, 10), False)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        with contextlib.nullcontext() if fits else pytest.raises(DataError, match="at most 144 pixels, got 16 x 10"):
            decode_file(tmp_path / "a.png", 8)
