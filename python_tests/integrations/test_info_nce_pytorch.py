import info_nce as peer
import pytest
import torch

from ltood_fast.integrations import info_nce_pytorch as ours
from python_tests.integrations.pairs import assert_same, rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("negatives", [0, 33])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_same_value_and_gradients(reduction, negatives, dtype):
    leaves = [rows(20, dtype=dtype), rows(20, dtype=dtype)] + [rows(negatives, dtype=dtype)] * (negatives > 0)
    adapter = ours.InfoNCE(0.2, reduction)
    assert_same(adapter, peer.InfoNCE(0.2, reduction), leaves)
    assert adapter.calls["served"] >= 1


def test_function():
    query, key = rows(9), rows(9)
    torch.testing.assert_close(ours.info_nce(query, key), peer.info_nce(query, key))


def test_negatives_of_each_query_go_to_the_library():
    adapter = ours.InfoNCE(negative_mode="paired")
    negatives = torch.randn(8, 5, 16, requires_grad=True)
    assert_same(adapter, peer.InfoNCE(negative_mode="paired"), [rows(8), rows(8), negatives])
    assert adapter.calls["negatives of each query (negative_mode='paired')"] >= 1
