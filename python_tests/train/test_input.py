"""Where the images come from does not change a run: host, training device, or files that workers decode."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from made_up import Jitter, Plain, data
from PIL import Image

from ltood_fast.data import DataError, ImageFiles, image_files, load_data, on_device, put_on_device
from ltood_fast.train.config import differing_keys, load_config, to_dict
from ltood_fast.train.evaluate import evaluate_run
from ltood_fast.train.loop import Stage
from ltood_fast.train.session import Session

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
CPU = torch.device("cpu")


@pytest.fixture
def weights(make_session, tmp_path):
    """(Of stage 1 after its epochs from a bundle, the session); `stop` ends the first attempt after as many epochs."""

    def train(name, bundle, stop=None):
        if stop:
            stage = opened(name, bundle)
            while stage.epoch < stop:
                stage.train_epoch(SimpleNamespace(set_postfix_str=lambda *_, **__: None, update=lambda _: None, n=0))
                stage.epoch += 1
            stage.save()
        stage = opened(name, bundle)
        stage.run()
        return torch.cat([p.detach().flatten() for p in stage.model.parameters()]), stage.session

    def opened(name, bundle):
        return Stage.open(
            "stage1", dataclasses.replace(make_session(tmp_path / name, optim__batch_size=10), data=bundle)
        )

    return train


def test_images_on_the_device_are_the_same_images(weights):
    host, _ = weights("host", data())
    bundle = put_on_device(data(), CPU, "always")
    assert bundle.train.images.data_ptr() == bundle.pool.data_ptr()  # views of one tensor
    assert bundle.ood.images.data_ptr() == bundle.pool[48].data_ptr()
    resident, session = weights("resident", bundle)
    assert torch.equal(resident, host)
    assert "_reader" not in vars(session)  # nothing was put together on the host
    assert put_on_device(data(n_ood=0), CPU, "always").ood is None


def test_auto_is_a_gpu_with_room(monkeypatch):
    bundle = data()
    assert put_on_device(bundle, CPU, "auto") is bundle
    size = bundle.train.images.nbytes + bundle.ood.images.nbytes
    cuda, free = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 10 * size))
    free.append(4 * size)
    assert on_device._fits(size, cuda)
    free.append(4 * size - 1)
    assert not on_device._fits(size, cuda)
    assert put_on_device(bundle, cuda, "auto") is bundle
    free.append(4 * size)
    assert put_on_device(bundle, cuda, "never") is bundle


@pytest.fixture
def from_files(tmp_path, monkeypatch):
    """A bundle of the made-up images as PNG files, decoded once or by two workers as they are used."""
    folders = {"train": data().train, "test": data().test, "pool": data().ood}
    for name, images in folders.items():
        for row, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
            path = tmp_path / "files" / name / images.class_names[label] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(path)

    def load(workers):
        monkeypatch.setattr(image_files, "STREAMED_BYTES", 0)
        places = {"data.root": str(tmp_path), "data.id": "folder:files", "data.ood": "folder:files/pool"}
        rest = {"data.image_size": "8", "data.cache_dir": str(tmp_path / "cache"), "data.imbalance": "0"}
        return load_data(load_config("smoke", {**places, **rest, "data.ood_size": "0", "data.workers": workers}).data)

    return load


def test_workers_change_no_batch_no_view_and_no_resumed_run(weights, from_files, monkeypatch):
    decoded, _ = weights("decoded", from_files("0"))
    bundle = from_files("2")
    assert isinstance(bundle.train.images, ImageFiles)
    with monkeypatch.context() as context:  # in training, all decoding is the workers'
        context.setattr(ImageFiles, "__getitem__", in_workers(ImageFiles.__getitem__))
        streamed, _ = weights("streamed", bundle)
        resumed, session = weights("resumed", bundle, stop=3)
    assert torch.equal(streamed, decoded)
    assert torch.equal(resumed, decoded)
    results = evaluate_run(session)
    assert [stage.name for stage in results.stages] == ["stage1"]
    assert results.resamplings[0].thumbnails[0].shape[1:] == (3, 8, 8)
    with pytest.raises(DataError, match="data.on_device must be auto or never for files that data.workers decode"):
        put_on_device(bundle, CPU, "always")
    assert put_on_device(bundle, CPU, "auto") is bundle


def in_workers(getitem):
    """`images[rows]`, which is what a batch is put together with, refused in this process."""

    def get(images, rows):
        assert isinstance(rows, slice) or torch.utils.data.get_worker_info() is not None
        return getitem(images, rows)

    return get


def test_where_images_are_may_change_from_one_resume_to_the_next():
    base = to_dict(load_config("smoke"))
    assert differing_keys(load_config("smoke", {"data.workers": "2", "data.on_device": "never"}), base) == []


def test_images_are_on_the_device_that_the_configuration_names(tmp_path, made_up_data):
    def opened(when):
        return Session.open(load_config("smoke", {"data.on_device": when, "run.device": "cpu"}), tmp_path)

    assert opened("always").data.pool is not None
    assert opened("auto").data.pool is None
    assert isinstance(opened("never").augment, Jitter)
    assert isinstance(opened("never").transform, Plain)
