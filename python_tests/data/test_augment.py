import dataclasses

import pytest
import torch

from ltood_fast.data import make_augment, make_eval_transform
from ltood_fast.data.augment import make_probe_augment
from ltood_fast.train.config import AugmentConfig

OFF = AugmentConfig(crop_min=1.0, flip=0.0, jitter_p=0.0, gray_p=0.0)  # the crop's shape alone is random
ALL = AugmentConfig(rotate=15.0, shift=0.1, blur_p=0.5)
BLACK, WHITE = -2.0, 2.0  # (0 - 0.5) / 0.25 and (1 - 0.5) / 0.25


def only(**options):
    return dataclasses.replace(OFF, **options)


def pictures(n, channels=3, size=16):
    """One random picture n times: what differs between the views is the augmentation."""
    picture = torch.randint(0, 256, (1, channels, size, size), generator=torch.Generator().manual_seed(5))
    return picture.to(torch.uint8).expand(n, -1, -1, -1)


def distinct(views):
    return len({view.numpy().tobytes() for view in views})


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32])
def test_views_keep_shape_and_range(channels, size):
    images = pictures(32, channels, size)
    before = images.clone()
    views = make_augment(ALL, size)(images)
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert float(views.min()) >= BLACK
    assert float(views.max()) <= WHITE
    assert torch.equal(images, before)
    assert not views.requires_grad


@pytest.mark.parametrize("channels", [1, 3])
def test_the_global_seed_decides_every_bit(channels):
    augment = make_augment(ALL, 16)

    def views(seed):
        torch.manual_seed(seed)
        return augment(pictures(64, channels))

    first = views(1)
    assert torch.equal(first, views(1))
    assert not torch.equal(first, views(2))
    torch.manual_seed(1)
    assert torch.equal(first, make_augment(ALL, 16)(pictures(64, channels)))  # and nothing else does


def test_one_rng_state_repeats_the_views_that_follow():
    augment = make_augment(ALL, 16)
    augment(pictures(8))
    state = torch.get_rng_state()
    first, second = augment(pictures(8)), augment(pictures(8))
    torch.set_rng_state(state)
    assert torch.equal(first, augment(pictures(8)))
    assert torch.equal(second, augment(pictures(8)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "config",
    [
        only(crop_min=0.1),
        only(jitter_p=1.0),
        only(rotate=30.0),
        only(shift=0.3),
        only(blur_p=1.0),
    ],
    ids=["crop", "jitter", "rotate", "shift", "blur"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_of_a_batch_gets_its_own_randomness(config, channels):
    assert distinct(make_augment(config, 16)(pictures(16, channels))) == 16


def test_the_largest_crop_of_a_square_leaves_the_image():
    # At scale 1 only a square crop fits; kornia falls back to the whole image.
    views = make_augment(OFF, 16)(pictures(4))
    assert torch.allclose(views, make_eval_transform(16)(pictures(4)), atol=1e-4)


def test_flips_half_of_the_images():
    images = pictures(400)
    flipped = make_augment(only(flip=0.5), 16)(images)
    plain = make_eval_transform(16)(images)
    is_plain = (flipped - plain).abs().amax((1, 2, 3)) < 1e-3
    is_mirrored = (flipped - plain.flip(-1)).abs().amax((1, 2, 3)) < 1e-3
    assert bool((is_plain ^ is_mirrored).all())
    assert 150 < int(is_mirrored.sum()) < 250


def test_grey_takes_its_share_of_colour_images():
    views = make_augment(only(gray_p=0.2), 16)(pictures(500))
    grey = (views - views[:, :1]).abs().amax((1, 2, 3)) < 1e-5
    assert 60 < int(grey.sum()) < 140


def test_jitter_takes_its_share_and_changes_colours():
    views = make_augment(only(jitter_p=0.8), 16)(pictures(500))
    plain = make_eval_transform(16)(pictures(1))
    changed = (views - plain).abs().amax((1, 2, 3)) > 1e-3
    assert 360 < int(changed.sum()) < 440


def test_grey_images_keep_dark_backgrounds():
    # Brightness scales and contrast stretches about the mean: an all-black image stays black, as torchvision has it.
    black = torch.zeros(32, 1, 16, 16, dtype=torch.uint8)
    assert torch.allclose(make_augment(only(jitter_p=1.0), 16)(black), torch.tensor(BLACK), atol=1e-5)


def test_crops_enlarge_a_part():
    # A white pixel column in the middle grows with the crop's scale; its mean grey tells by how much.
    images = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    images[:, :, :, 14:18] = 255
    views = make_augment(only(crop_min=0.1), 32)(images)
    share = (views - BLACK).mean((1, 2, 3)) / (WHITE - BLACK)
    assert float(share.max()) > 0.25
    assert float(share.max() / 0.125) < 1 / (0.1**0.5 * (3 / 4) ** 0.5)  # narrowest crop: area 0.1, ratio 3/4


def test_evaluation_is_the_plain_image_scaled():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    views = make_eval_transform(3)(images)
    assert torch.allclose(views.flatten(), torch.tensor([BLACK, (0.2 - 0.5) / 0.25, WHITE]))


@pytest.mark.parametrize("batch", [4, 7])  # 4: as many as colour jitters in an order and numbers in a shape
@pytest.mark.parametrize("channels", [1, 3])
def test_parts_of_a_batch_get_the_views_of_the_whole(channels, batch):
    augment, images = make_augment(ALL, 16), pictures(batch, channels)
    torch.manual_seed(3)
    whole = augment(images)
    after, parts = torch.get_rng_state(), []
    for first, last in ((0, 3), (3, batch)):
        torch.manual_seed(3)
        parts.append(augment(images[first:last], first, batch))
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


def test_a_kornia_that_draws_for_other_images_is_refused(monkeypatch):
    import kornia.augmentation as K

    real = K.RandomHorizontalFlip.forward_parameters
    short = lambda self, shape: {**real(self, shape), "batch_prob": torch.ones(1)}  # noqa: E731
    monkeypatch.setattr(K.RandomHorizontalFlip, "forward_parameters", short)
    with pytest.raises(RuntimeError, match="batch_prob of kornia's RandomHorizontalFlip must be drawn for each of 6"):
        make_augment(only(flip=0.5), 16)(pictures(3), 3, 6)


def test_evaluation_sees_the_middle_of_a_larger_square():
    images = torch.arange(8 * 8, dtype=torch.uint8).view(1, 1, 8, 8)
    seen = make_eval_transform(4)(images)
    assert torch.equal(seen, (images[..., 2:6, 2:6].float() / 255 - 0.5) / 0.25)
    assert make_augment(OFF, 4)(images).shape == (1, 1, 4, 4)


def test_a_probes_view_is_a_shifted_and_flipped_image():
    """At 32 pixels: by up to 4 pixels each way over black borders, as the baselines' code has it."""
    images = torch.zeros(256, 1, 32, 32, dtype=torch.uint8)
    images[..., 10, 12] = 255
    views = make_probe_augment(32)(images)
    rows, columns = (views[:, 0] > 0).nonzero()[:, 1:].T
    assert len(rows) == 256
    assert set(rows.tolist()) == set(range(6, 15))
    assert set(columns.tolist()) == set(range(8, 17)) | set(range(15, 24))  # 31 - 12 = 19 where it is flipped
    assert float(make_probe_augment(96)(torch.full((2, 3, 128, 128), 255, dtype=torch.uint8)).min()) == pytest.approx(
        WHITE
    )
