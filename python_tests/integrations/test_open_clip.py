import pytest
import torch
import torch.nn.functional as F
from open_clip import loss as peer

from ltood_fast.integrations import open_clip as ours
from python_tests.integrations.pairs import assert_same, rows

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_dict", [False, True])
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_same_value_and_gradients(name, bias, output_dict, dtype):
    adapter = getattr(ours, name)()
    image, text = (F.normalize(rows(40, dtype=dtype), dim=1).detach().requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, dtype=dtype, requires_grad=True)
    leaves = [image, text, scale]
    if bias is not None:
        leaves.append(torch.tensor(bias, dtype=dtype, requires_grad=True))
    others = (output_dict,) if bias is not None else (None, output_dict)
    before = dict(adapter.calls)
    assert_same(adapter, getattr(peer, name)(), leaves, *others)
    assert adapter.calls["served"] == before.get("served", 0) + 1


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_unserved_calls_go_to_open_clip(name):
    adapter = getattr(ours, name)()
    leaves = [rows(6), rows(6), torch.tensor(-2.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)]
    assert_same(adapter, getattr(peer, name)(), leaves)
    assert adapter.calls["a logit_scale that is not positive"] >= 1


def test_adapters_take_the_arguments_of_open_clip():
    options = {"local_loss": True, "gather_with_grad": True, "cache_labels": True, "rank": 0, "world_size": 1}
    assert isinstance(ours.ClipLoss(**options), peer.ClipLoss)
    assert isinstance(ours.SigLipLoss(cache_labels=True, dist_impl="gather"), peer.SigLipLoss)
