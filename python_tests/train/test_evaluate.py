"""What evaluation hands to the classifiers: the few-shot set, and two views of test images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up import blobs, session, train
from PIL import Image

from ltood_fast.data.image_set import DataError
from ltood_fast.train import evaluate
from ltood_fast.train.evaluate import few_shot_set, probe_parts


def test_no_few_shot_set_unless_asked_for(tmp_path):
    assert few_shot_set(session(tmp_path)) is None


def test_few_shot_rows_follow_the_seed_of_the_data(tmp_path):
    chosen = [few_shot_set(session(tmp_path, eval__few_shot=4, **seeds))
              for seeds in ({}, {"seed": 5}, {"data__seed": 5})]  # fmt: skip
    labels = session(tmp_path).data.probe.labels
    assert torch.bincount(labels[chosen[0]]).tolist() == [4, 4, 4]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_more_than_the_probe_set_has(tmp_path):
    with pytest.raises(ValueError, match="eval.few_shot must be at most 10, the images of the smallest class"):
        few_shot_set(session(tmp_path, eval__few_shot=11))


def test_a_split_names_rows_of_the_probe_set(tmp_path):
    np.save(tmp_path / "few.npy", np.array([4, 0, 8]))
    made = session(tmp_path, data__few_shot_list=tmp_path / "few.npy", eval__few_shot=3)  # the list wins
    assert few_shot_set(made).tolist() == [4, 0, 8]


def test_a_split_next_to_a_probe_split_names_rows_of_the_whole(tmp_path):
    np.save(tmp_path / "few.npy", np.array([40, 0, 38]))
    made = session(tmp_path, data__few_shot_list=tmp_path / "few.npy", data__probe_split="probe.npy")
    whole = blobs(60, 9)
    made = replace(made, data=replace(made.data, labelled=whole))
    assert torch.equal(few_shot_set(made).images, whole.images[[40, 0, 38]])


def test_a_list_names_images_of_its_own(tmp_path):
    for c in range(3):
        Image.fromarray(np.full((8, 8, 3), 50 * c, dtype=np.uint8)).save(tmp_path / f"{c}.png")
    (tmp_path / "few.txt").write_text("2.png 2\n0.png 0\n1.png 1\n")
    options = {"data__few_shot_list": tmp_path / "few.txt", "data__cache_dir": tmp_path, "data__image_size": 8}
    images = few_shot_set(session(tmp_path, **options))
    assert images.labels.tolist() == [2, 0, 1]
    assert images.images[:, :, 0, 0].tolist() == [[100], [0], [50]]  # one channel, as the run's images have


@pytest.mark.parametrize(("rows", "odd"), [([0, 1, 3], "2"), ([0], "1, 2")])
def test_a_few_shot_set_must_hold_every_class(rows, odd, tmp_path):
    np.save(tmp_path / "few.npy", np.array(rows))
    with pytest.raises(DataError) as error:
        few_shot_set(session(tmp_path, data__few_shot_list=tmp_path / "few.npy"))
    assert str(error.value).startswith(
        f"data: data.few_shot_list must hold each of the 3 classes and no other label, got one that differs in {odd}: "
    )


def test_views_are_of_the_whole_test_set_and_draw_no_numbers(tmp_path, monkeypatch):
    made, seen = session(tmp_path), []

    def embed(model, images, fabric, transform):
        seen.append(images)
        return transform(images).flatten(1), None

    monkeypatch.setattr(evaluate, "embed", embed)
    monkeypatch.setattr(evaluate, "ALIGNMENT_IMAGES", 6)
    state = torch.get_rng_state()
    first, second = evaluate._two_views(made, None)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, _ = evaluate._two_views(made, None)
    assert torch.equal(seen[0], made.data.test.images[torch.tensor([0, 5, 10, 15, 20, 25])])
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert (first - second).abs().max() < 1.0  # the same images


def test_the_epoch_is_picked_on_images_outside_the_split(tmp_path):
    np.save(tmp_path / "probe.npy", np.arange(0, 60, 2))
    made = session(tmp_path, data__root=tmp_path, data__probe_split="probe.npy")
    whole = blobs(60, 9)
    made = replace(made, data=replace(made.data, probe=whole.subset(torch.arange(0, 60, 2)), labelled=whole))
    learnt, held_out = probe_parts(made)
    assert torch.equal(learnt.images, whole.images[::2])
    assert torch.equal(held_out.images, whole.images[1::2])


def test_without_a_split_a_tenth_of_each_class_is_held_out(tmp_path):
    made = session(tmp_path)
    learnt, held_out = probe_parts(made)
    assert torch.bincount(held_out.labels).tolist() == [1, 1, 1]
    assert torch.bincount(learnt.labels).tolist() == [9, 9, 9]
    rows = {image.numpy().tobytes() for image in learnt.images}
    assert not rows & {image.numpy().tobytes() for image in held_out.images}


def test_a_probe_with_views_is_part_of_a_run(tmp_path, monkeypatch):
    """The views are those of the probe's augmentation, drawn by (seed, epoch) without touching the global numbers."""
    made = session(tmp_path, eval__probe="sgd", eval__probe_augment=True, eval__probe_batch=7, stages="simclr")
    train(made, "simclr")
    seen = []
    protocol = evaluate.EvalProtocol
    monkeypatch.setattr(evaluate, "EvalProtocol", lambda *a, **k: seen.append(k) or protocol(*a, **k))
    evaluate.evaluate_run(made)
    state, [options] = torch.get_rng_state(), seen
    assert options["probe_batch"] == 7
    first, again, other = (options["epochwise"].features_of(epoch) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == len(options["epochwise"].labels) == 27
    assert torch.equal(torch.get_rng_state(), state)
