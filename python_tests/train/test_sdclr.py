"""SDCLR's defining equations against plain PyTorch, and its state in checkpoints."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from made_up import NoBar, train, weights

import ltood_fast
from ltood_fast.train.checkpoint import load_checkpoint
from ltood_fast.train.config import ConfigError, load_config
from ltood_fast.train.grad_cache import cached_backward
from ltood_fast.train.loop import Stage
from ltood_fast.train.model import make_model
from ltood_fast.train.sdclr import SDCLR

WITH_SDCLR = {"base__name": "sdclr"}


def tiny(width=4, out=8):
    options = {"model.encoder": "tiny_conv", "model.width": str(width), "model.hidden": "16", "model.out": str(out)}
    return make_model(load_config("smoke", options).model, channels=1)


def small_resnet():
    return make_model(load_config("smoke", {"model.encoder": "small_resnet", "model.width": "4"}).model, channels=3)


def convolutions(model):
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}


@pytest.mark.parametrize("prune", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("make", [tiny, small_resnet])
def test_the_smallest_weights_of_all_convolutions_are_pruned(make, prune):
    """The threshold of the published code: the ceil(prune n)-th magnitude of all, in ascending order from 0."""
    both = SDCLR(make(), prune)
    both.renew_masks()
    kernels = convolutions(both.dense)
    masks = both.competitor.masks
    assert masks.keys() == kernels.keys()
    magnitudes = np.abs(np.concatenate([kernel.numpy().ravel() for kernel in kernels.values()]))
    pruned = math.ceil(prune * len(magnitudes))
    threshold = np.sort(magnitudes)[pruned]
    for name, kernel in kernels.items():
        assert np.array_equal(masks[name].numpy(), np.abs(kernel.numpy()) >= threshold), name
    assert sum(int((~mask).sum()) for mask in masks.values()) == pruned
    if prune == 0.9:  # not the same share of each layer
        shares = [float((~mask).float().mean()) for mask in masks.values()]
        assert max(shares) - min(shares) > 0.05


def test_convolutions_of_a_resnet_are_pruned_and_nothing_else():
    both = SDCLR(small_resnet(), 0.5)
    both.renew_masks()
    assert any("downsample" in name for name in both.competitor.masks)
    assert len(both.competitor.masks) == 12
    assert not any(name.startswith("head") for name in both.competitor.masks)


def test_ties_go_to_the_earlier_weight_and_one_weight_stays():
    both = SDCLR(tiny(), 1.0)
    with torch.no_grad():
        for kernel in convolutions(both.dense).values():
            kernel.fill_(0.5)
    both.renew_masks()
    kept = torch.cat([mask.flatten() for mask in both.competitor.masks.values()])
    assert kept.nonzero().tolist() == [[len(kept) - 1]]


def plain_branch(model, masks, norms, views):
    """tiny_conv and its head by hand; `norms`: (weight, bias) of each BatchNorm, batch statistics."""
    x, modules = views, list(model.encoder)[:9]
    for place, strides in enumerate((2, 2, 1)):
        kernel = modules[3 * place].weight
        mask = masks.get(f"encoder.{3 * place}")
        x = F.conv2d(x, kernel if mask is None else kernel * mask, stride=strides, padding=1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        scale, shift = (part.view(1, -1, 1, 1) for part in norms[place])
        x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).relu()
    x = x.mean((2, 3))
    for place, layer in ((3, model.head[0]), (4, model.head[3])):
        x = x @ layer.weight.T
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * norms[place][0] + norms[place][1]
        x = x.relu() if place == 3 else x
    return x


def plain_nt_xent(one, other, tau):
    z = F.normalize(torch.cat([one, other]), dim=1)
    s = z @ z.T / tau
    n = len(one)
    lse = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf).logsumexp(1)
    return (lse - torch.cat([s.diagonal(n), s.diagonal(-n)])).mean()


def test_gradients_are_those_of_the_two_passes_of_the_paper():
    """Each branch with the embeddings of the other one held; every parameter gets the sum, in float64."""
    both = SDCLR(tiny().double(), 0.6)
    norms = both.competitor.norms
    with torch.no_grad():
        for p in [*both.dense.parameters(), *norms.parameters()]:
            p.add_(0.3 * torch.randn_like(p))  # norms that differ, biases that are not 0
    both.renew_masks()
    views = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    loss = ltood_fast.nt_xent(both(views), 0.2)
    loss.backward()
    found = {name: p.grad.clone() for name, p in both.named_parameters()}
    both.zero_grad()

    dense_norms = [(m.weight, m.bias) for m in both.dense.modules() if hasattr(m, "running_mean")]
    pruned_norms = [(m.weight, m.bias) for m in norms]
    masks = both.competitor.masks
    one = plain_branch(both.dense, {}, dense_norms, views[:6])
    other = plain_branch(both.dense, masks, pruned_norms, views[6:])
    expected = plain_nt_xent(one, other, 0.2)
    assert torch.allclose(loss, expected, rtol=1e-10)
    plain_nt_xent(one, other.detach(), 0.2).backward()
    alone = {name: both.dense.get_parameter(f"{name}.weight").grad.clone() for name in masks}
    plain_nt_xent(one.detach(), other, 0.2).backward()
    for name, p in both.named_parameters():
        assert torch.allclose(found[name], p.grad, rtol=1e-8, atol=1e-12), name
        assert p.grad.abs().sum() > 0, name
    for name, mask in masks.items():  # a pruned weight learns from the dense branch alone, a kept one from both
        grad = found[f"dense.{name}.weight"]
        assert torch.allclose(grad[~mask], alone[name][~mask], rtol=1e-8, atol=1e-12)
        assert not torch.allclose(grad[mask], alone[name][mask], rtol=1e-3)


def test_each_branch_has_the_statistics_of_its_own_views():
    both = SDCLR(tiny(), 0.5).train()
    both.renew_masks()
    views = torch.cat([torch.rand(5, 1, 8, 8), 3 + torch.rand(5, 1, 8, 8)])
    with torch.no_grad():
        both(views)
    kernel, mask = both.dense.encoder[0].weight, both.competitor.masks["encoder.0"]
    for norm, seen, weight in ((both.dense.encoder[1], views[:5], kernel),
                               (both.competitor.norms[0], views[5:], kernel * mask)):  # fmt: skip
        x = F.conv2d(seen, weight, stride=2, padding=1)
        assert torch.allclose(norm.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-4, atol=1e-6)
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-4)
        assert norm.num_batches_tracked == 1


def test_masks_are_of_the_weights_at_the_start_of_each_epoch(make_session):
    stage = Stage.open("simclr", make_session(**WITH_SDCLR))
    seen = []
    for _ in range(2):
        start = SDCLR(stage.model, 0.9)
        start.renew_masks()
        stage.train_epoch(NoBar())
        stage.epoch += 1
        masks = stage.sdclr.competitor.masks
        assert all(torch.equal(masks[name], mask) for name, mask in start.competitor.masks.items())
        seen.append(torch.cat([mask.flatten() for mask in masks.values()]))
        assert (~seen[-1]).sum() == math.ceil(0.9 * len(seen[-1]))
    assert not torch.equal(*seen)


def competitor(stage):
    state = stage.sdclr.competitor.state_dict()
    return torch.cat([x.flatten().float() for x in [*state.pop("_extra_state").values(), *state.values()]])


@pytest.mark.parametrize(("name", "options"), [
    ("simclr", {}),
    ("stage1", {"stage1__init": "simclr", "stage1__neighbors": "queue"}),
    ("joint", {"stages": "joint"}),
])  # fmt: skip
def test_a_resumed_stage_ends_in_the_same_two_networks(name, options, make_session, tmp_path):
    whole, parts = (make_session(run_dir=tmp_path / run, **WITH_SDCLR, **options) for run in ("whole", "parts"))
    if "stage1__init" in options:
        for session in (whole, parts):
            simclr = train(session, "simclr")
            assert torch.equal(competitor(Stage.open(name, session)), competitor(simclr))
    expected = train(whole, name)
    for _ in range(expected.method.epochs):
        train(parts, name, epochs=1)
    found = Stage.open(name, parts)
    assert torch.equal(weights(found), weights(expected))
    assert torch.equal(competitor(found), competitor(expected))


def test_a_checkpoint_holds_the_dense_network_by_its_names(make_session, tmp_path):
    session = make_session(**WITH_SDCLR)
    stage = train(session, "simclr")
    state = load_checkpoint(tmp_path / "simclr" / "last.pt", session.config)
    plain = session.new_model()
    plain.load_state_dict(state["model"])
    images = session.data.test.images
    assert all(torch.equal(*pair) for pair in zip(session.embed(plain, images), session.embed(stage.model, images),
                                                  strict=True))  # fmt: skip
    own = state["competitor"]
    assert sum(int((~mask).sum()) for mask in own["_extra_state"].values()) > 0
    assert "competitor" not in load_checkpoint(
        train(make_session(run_dir=tmp_path / "plain"), "simclr", epochs=1).checkpoint
    )


def test_stage2_trains_the_dense_network_alone(make_session):
    session = make_session(**WITH_SDCLR)
    stage1 = train(session, "stage1", epochs=2)
    stage2 = Stage.open("stage2", session)
    assert stage2.sdclr is None
    assert torch.equal(weights(stage2), weights(stage1))
    train(session, "stage2", epochs=1)


def test_the_grad_cache_gives_the_gradient_of_the_whole_batch():
    model = tiny()
    for parent in (model.encoder, model.head):  # whose statistics are of a part there
        for name, child in parent.named_children():
            if "BatchNorm" in type(child).__name__:
                setattr(parent, name, torch.nn.Identity())
    both = SDCLR(model.double(), 0.5)
    both.renew_masks()
    views = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    expected = torch.autograd.grad(ltood_fast.nt_xent(both(views)), list(both.parameters()))
    fabric = Fabric(accelerator="cpu", devices=1)
    cached_backward(fabric, fabric.setup(both), lambda n: (ltood_fast.nt_xent(n(views)), {}), views, 2)
    for p, gradient in zip(both.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-9, atol=1e-14)


def test_one_image_at_a_time_is_one_sentence(make_session):
    stage = Stage.open("simclr", make_session(**WITH_SDCLR, optim__micro_batch=5))  # 16 images: 5, 5, 5 and 1
    with pytest.raises(ValueError, match="base.name sdclr must see two images of a rank or more at a time, got 1"):
        stage.train_epoch(NoBar())


@pytest.mark.parametrize(("key", "value", "sentence"), [
    ("base.prune", "1.5", "config: base.prune must be in [0, 1], got 1.5"),
    ("base.name", "moco", "config: base.name must be one of simclr, sdclr, got 'moco'"),
])  # fmt: skip
def test_what_a_base_can_be(key, value, sentence):
    with pytest.raises(ConfigError) as error:
        load_config("smoke", {key: value})
    assert str(error.value) == sentence
