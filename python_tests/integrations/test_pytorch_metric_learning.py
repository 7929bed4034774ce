import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers

from ltood_fast.integrations import pytorch_metric_learning as ours
from python_tests.integrations.pairs import assert_same, rows

DTYPES = [torch.float32, torch.float64]
LABELS = {
    "pairs": lambda n: torch.arange(n) % (n // 2),
    "classes, some alone": lambda n: torch.randint(0, n // 2, (n,)),
    "two classes": lambda n: torch.arange(n) % 2,
    "one class": lambda n: torch.zeros(n, dtype=torch.int64),
    "no other row": lambda n: torch.arange(n),
}
REDUCERS = [reducers.MeanReducer, reducers.AvgNonZeroReducer, reducers.PerAnchorReducer]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_same_value_and_gradients(name, labels, dtype):
    adapter, theirs = getattr(ours, name)(0.2), getattr(losses, name)(0.2)
    assert_same(adapter, theirs, [rows(24, 8, dtype)], LABELS[labels](24))


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_reducers(name, reducer):
    if name == "SupConLoss" and reducer is reducers.PerAnchorReducer:
        reducer = reducers.MeanReducer
    adapter, theirs = (getattr(m, name)(0.2, reducer=reducer()) for m in (ours, losses))
    served = adapter.calls["served"]
    assert_same(adapter, theirs, [rows(24, 8)], LABELS["pairs"](24))
    assert adapter.calls["served"] == served + 1


@pytest.mark.parametrize("labels", ["pairs", "classes, some alone"])
def test_reference_embeddings(labels):
    """Cross-batch memory: keys and their labels from elsewhere."""
    embeddings, memory = rows(16, 8), rows(60, 8)
    own, theirs = LABELS[labels](16), torch.randint(0, 12, (60,))

    def call(loss):
        return lambda x, y: loss(x, own, ref_emb=y, ref_labels=theirs)

    adapter = ours.NTXentLoss(0.2)
    served = adapter.calls["served"]
    assert_same(call(adapter), call(losses.NTXentLoss(0.2)), [embeddings, memory])
    assert adapter.calls["served"] == served + 1
    assert_same(call(ours.SupConLoss(0.2)), call(losses.SupConLoss(0.2)), [embeddings, memory])
    assert ours.SupConLoss.calls["another set of embeddings (ref_emb)"] >= 1


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_unserved_calls_go_to_the_library(name):
    labels = LABELS["two classes"](12)
    embeddings = rows(12, 8)
    pairs = miners.MultiSimilarityMiner()(embeddings.detach(), labels)
    adapter, theirs = getattr(ours, name)(0.2), getattr(losses, name)(0.2)
    assert_same(adapter, theirs, [embeddings], labels, pairs)
    assert adapter.calls["pairs of a miner (indices_tuple)"] >= 1
    adapter, theirs = (getattr(m, name)(0.2, distance=distances.LpDistance()) for m in (ours, losses))
    assert_same(adapter, theirs, [embeddings], labels)
    assert adapter.calls["a distance other than the cosine"] >= 1
