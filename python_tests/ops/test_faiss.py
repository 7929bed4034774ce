"""FAISS on the GPU, on a fake that counts: searches run on the device of the rows, and no row is copied to the host."""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import ltood_fast
from ltood_fast import _faiss
from ltood_fast.sampling import kmeans
from ltood_fast.sampling.resample import cluster_embeddings


class GpuIndex:
    """An index that counts its calls and takes tensors alone: for a row on the device, an array is a copy."""

    def __init__(self, index, calls: Counter):
        vars(self).update(index=index, calls=calls)

    def __getattr__(self, name):
        return getattr(self.index, name)

    def __setattr__(self, name, value):
        setattr(self.index, name, value)

    def _call(self, name, rows, *arguments):
        assert isinstance(rows, torch.Tensor)
        assert rows.is_contiguous()
        self.calls[name] += 1
        return getattr(self.index, name)(rows.numpy(), *arguments)

    def train(self, rows):
        self._call("train", rows)

    def add(self, rows):
        self._call("add", rows)

    def search(self, rows, k):
        assert max(k, getattr(self.index, "nprobe", 1)) <= _faiss.MOST_SELECTED_ON_GPU
        return tuple(map(torch.from_numpy, self._call("search", rows, k)))


class FakeFaiss:
    """FAISS with one GPU."""

    StandardGpuResources = object

    def __init__(self, faiss, gpus: int):
        self.faiss, self.gpus, self.calls = faiss, gpus, Counter()

    def __getattr__(self, name):
        return getattr(self.faiss, name)

    def get_num_gpus(self):
        return self.gpus

    def index_cpu_to_gpu(self, resources, device, index):
        self.calls["moved"] += 1
        return GpuIndex(index, self.calls)


@pytest.fixture
def fake(monkeypatch):
    """Installs the fake; `fake(gpus)` says how many GPUs it has."""

    def install(gpus: int) -> Counter:
        import faiss

        module = FakeFaiss(faiss, gpus)
        monkeypatch.setitem(sys.modules, "faiss", module)
        monkeypatch.setitem(sys.modules, "faiss.contrib.torch_utils", SimpleNamespace())
        monkeypatch.setattr(_faiss, "on_gpu", lambda rows: True)
        return module.calls

    return install


@pytest.mark.parametrize("spherical", [True, False])
def test_kmeans_searches_on_the_gpu(fake, spherical):
    x = torch.randn(300, 6)
    centroids, assignments = kmeans(x, 9, iterations=4, seed=5, spherical=spherical)
    calls = fake(1)
    on_gpu = kmeans(x, 9, iterations=4, seed=5, spherical=spherical)
    assert calls == {"moved": 1, "add": 5, "search": 5}
    assert torch.equal(on_gpu[1], assignments)
    torch.testing.assert_close(on_gpu[0], centroids, rtol=1e-5, atol=1e-6)


def test_as_many_clusters_as_rows_on_the_gpu(fake):
    calls = fake(1)
    assert kmeans(torch.eye(5), 5)[1].tolist() == [0, 1, 2, 3, 4]
    assert calls == {"moved": 1, "add": 1, "search": 1}


def test_the_sampler_clusters_on_the_gpu(fake):
    x = torch.randn(200, 6)
    expected = cluster_embeddings(x, 4, refine_steps=0)
    calls = fake(1)
    assert torch.equal(cluster_embeddings(x, 4, refine_steps=0).assignments, expected.assignments)
    assert calls["search"] == 21


def test_ivf_density_searches_on_the_gpu(fake):
    x = torch.randn(400, 8)
    expected = ltood_fast.knn_density(x, 5, method="ivf", n_lists=16, n_probes=3)
    calls = fake(1)
    found = ltood_fast.knn_density(x, 5, method="ivf", n_lists=16, n_probes=3)
    assert calls == {"moved": 1, "train": 1, "add": 1, "search": 1}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("gpus", [0, 1])
def test_what_a_gpu_cannot_select_stays_on_the_cpu(fake, gpus, monkeypatch):
    x = torch.randn(100, 8)
    calls = fake(gpus)
    monkeypatch.setattr(_faiss, "MOST_SELECTED_ON_GPU", 5 if gpus else 2048)
    ltood_fast.knn_density(x, 5, method="ivf", n_lists=4, n_probes=3)  # 6 neighbours, as a row finds itself
    assert not calls


def test_rows_with_short_lists_are_searched_exactly(fake):
    x = torch.randn(60, 5)
    fake(1)
    found = ltood_fast.knn_density(x, 40, method="ivf", n_lists=20, n_probes=1)
    torch.testing.assert_close(found, ltood_fast.knn_density(x, 40), rtol=1e-5, atol=1e-6)


def test_two_packages_of_faiss_are_named(monkeypatch):
    monkeypatch.setattr(_faiss.metadata, "version", lambda name: "1.15.1")
    sentence = "kmeans: faiss-cpu 1.15.1 and faiss-gpu 1.15.1 overwrite each other's files: `pip uninstall faiss-cpu"
    with pytest.warns(UserWarning, match=sentence):
        kmeans(torch.eye(4), 2)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="FAISS cannot be imported .* overwrite each other's files"):
        kmeans(torch.eye(4), 2)


@pytest.mark.cuda
def test_kmeans_and_density_of_rows_on_a_device():
    """On hardware: the same clusters and densities as on the CPU."""
    import faiss

    if faiss.get_num_gpus() == 0:
        pytest.skip("this FAISS has no GPU")
    blobs = (8 * torch.eye(16)[:6]).repeat(50, 1)
    x = blobs + 0.1 * torch.randn(300, 16)
    assert torch.equal(kmeans(x.cuda(), 6, seed=3)[1].cpu(), kmeans(x, 6, seed=3)[1])
    found = ltood_fast.knn_density(x.cuda(), 5, method="ivf", n_lists=6, n_probes=6)
    torch.testing.assert_close(found.cpu(), ltood_fast.knn_density(x, 5), rtol=1e-4, atol=1e-5)
