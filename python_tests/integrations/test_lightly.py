import lightly.loss as peer
import pytest
import torch

from ltood_fast.integrations import lightly as ours
from python_tests.integrations.pairs import assert_same, rows

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "DCLWLoss"])
def test_same_value_and_gradients(name, temperature, dtype):
    adapter, theirs = getattr(ours, name)(temperature), getattr(peer, name)(temperature)
    assert_same(adapter, theirs, [rows(20, dtype=dtype), rows(20, dtype=dtype)])
    assert adapter.calls["served"] >= 1


@pytest.mark.parametrize("detached", [False, True])
def test_memory_bank_moves_as_lightlys(detached):
    """The bank is filled by the keys of every call, and starts the same from one seed."""
    torch.manual_seed(3)
    adapter = ours.NTXentLoss(0.2, memory_bank_size=(50, 16))
    torch.manual_seed(3)
    theirs = peer.NTXentLoss(0.2, memory_bank_size=(50, 16))
    for _ in range(4):
        queries, keys = rows(20), rows(20)
        leaves = [queries, keys.detach() if detached else keys]
        assert_same(adapter, theirs, leaves)
    torch.testing.assert_close(adapter.memory_bank.bank, theirs.memory_bank.bank)


def test_weights_of_the_positives():
    def weight(out0, out1):
        return ((out0 - out1) ** 2).sum(dim=1)

    assert_same(ours.DCLLoss(0.2, weight_fn=weight), peer.DCLLoss(0.2, weight_fn=weight), [rows(12), rows(12)])


def test_unserved_calls_go_to_lightly():
    adapter = ours.NTXentLoss(-0.5)
    assert_same(adapter, peer.NTXentLoss(-0.5), [rows(5), rows(5)])
    assert adapter.calls["a temperature that is not positive"] >= 1
    with pytest.raises(ValueError, match="Illegal temperature"):
        ours.NTXentLoss(0.0)
