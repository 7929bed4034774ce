import pytest
import torch
from made_up import train, weights

import ltood_fast
from ltood_fast.train.history import read_history
from ltood_fast.train.loop import Stage

JOINT = {"stages": "joint"}


def test_the_loss_is_the_sum_of_all_four_after_the_warmup(make_session, tmp_path):
    train(make_session(**JOINT, stage1__alpha=0.5, stage2__beta=0.25), "joint")
    lines = read_history(tmp_path / "joint" / "history.jsonl")
    assert [line["images"] for line in lines] == [48, 64, 64, 64, 64]
    assert lines[0]["parts"] == {}
    for line in lines[1:]:
        parts = line["parts"]
        total = parts["psd"] + 0.5 * parts["domain"] + parts["guided"] + 0.25 * parts["distill"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    assert sorted(path.name for path in (tmp_path / "joint").glob("resample_*")) == [
        "resample_0001.pt",
        "resample_0003.pt",
    ]


@pytest.mark.parametrize("views", ["augmented", "clean"])
def test_the_guided_losses_see_the_id_images_alone(views, make_session, monkeypatch):
    session = make_session(**JOINT, stage2__guide_views=views)
    stage = train(session, "joint", epochs=2)
    given, real = {}, ltood_fast.stage2_loss

    def record(z, guide, clusters, far, *args, **options):
        given.update(z=z, guide=guide, clusters=clusters)
        return real(z, guide, clusters, far, *args, **options)

    monkeypatch.setattr(ltood_fast, "stage2_loss", record)
    rows = torch.tensor([50, 3, 7, 48, 11])
    seen, z = session.two_views(rows), torch.randn(10, 16)
    stage.method.loss_of(z, seen, rows, 2)
    own = [1, 2, 4, 6, 7, 9]
    assert torch.equal(given["z"], z[own])
    assert given["clusters"].tolist() == stage.method.guide.clusters[[3, 7, 11, 3, 7, 11]].tolist()
    images = session.transform(session.data.train.images[[3, 7, 11, 3, 7, 11]]) if views == "clean" else seen[own]
    with torch.no_grad():
        assert torch.allclose(given["guide"], stage.method.guide.network(images), atol=1e-5)


def test_the_guide_is_the_network_of_the_last_sampling(make_session):
    stage = Stage.open("joint", make_session(**JOINT, stage1__resample_every=2))
    method, seen = stage.method, []
    for epoch in range(5):
        before = weights(stage)
        method.begin_epoch(epoch)
        if epoch in (1, 3):
            seen.append(before)
        assert (method.guide is None) == (epoch == 0)
        if epoch:
            guide = method.guide.network
            assert torch.equal(torch.cat([x.flatten().float() for x in guide.state_dict().values()]), seen[-1])
            assert not guide.training
            assert not any(p.requires_grad for p in guide.parameters())
        with torch.no_grad():
            for p in stage.model.parameters():
                p.add_(0.01 * torch.randn_like(p))
    assert not torch.equal(*seen)


def test_a_batch_without_id_images_goes_without_a_guide(make_session):
    method = train(make_session(**JOINT), "joint", epochs=2).method
    rows = torch.tensor([50, 49, 51, 48])
    loss, parts = method.loss_of(torch.randn(8, 16), torch.rand(8, 1, 8, 8), rows, 2)
    assert set(parts) & {"guided", "distill"} == set()
    assert torch.isfinite(loss)
    rows[0] = 5  # two rows: too few for two neighbours
    assert "guided" not in method.loss_of(torch.randn(8, 16), torch.rand(8, 1, 8, 8), rows, 2)[1]
    rows[1] = 6
    assert "guided" in method.loss_of(torch.randn(8, 16), torch.rand(8, 1, 8, 8), rows, 2)[1]


@pytest.mark.parametrize("views", ["augmented", "clean"])
def test_a_stage_that_is_resumed_ends_in_the_same_weights(views, make_session, tmp_path):
    options = {**JOINT, "stage2__guide_views": views}
    whole, parts = (make_session(run_dir=tmp_path / run, **options) for run in ("whole", "parts"))
    expected = train(whole, "joint")
    for _ in range(5):
        train(parts, "joint", epochs=1)
    assert torch.equal(weights(Stage.open("joint", parts)), weights(expected))


def test_too_many_guide_clusters_are_refused_at_the_start(make_session):
    with pytest.raises(ValueError, match="stage2.clusters must be at most the 48 ID images, got 49"):
        Stage.open("joint", make_session(**JOINT, stage2__clusters=49))
