import copy
import math
import shutil

import pytest
import torch
from made_up import NoBar, train, weights

from ltood_fast.train.checkpoint import FIELDS, CheckpointError, load_checkpoint, save_checkpoint
from ltood_fast.train.checks import check_run
from ltood_fast.train.config import ConfigError, load_config
from ltood_fast.train.history import read_history
from ltood_fast.train.loop import Stage, TrainingError
from ltood_fast.train.methods import Stage1, Stage2


def test_resampling_happens_after_the_warmup_and_every_t_epochs(make_session, tmp_path):
    train(make_session(stage1__epochs=8, stage1__warmup_epochs=2, stage1__resample_every=3), "stage1")
    assert sorted(path.name for path in (tmp_path / "stage1").glob("resample_*")) == [
        "resample_0002.pt",
        "resample_0005.pt",
    ]
    images = [line["images"] for line in read_history(tmp_path / "stage1" / "history.jsonl")]
    assert images == [48, 48, 64, 64, 64, 64, 64, 64]  # 48 ID + 20 OOD in batches of 16


@pytest.mark.parametrize("strategy", ["tailness", "random"])
def test_sampled_images_fill_the_budget_without_repetition(strategy, make_session, tmp_path):
    train(make_session(stage1__ood_strategy=strategy), "stage1")
    for path in (tmp_path / "stage1").glob("resample_*"):
        saved = torch.load(path, weights_only=True)
        assert len(saved["indices"]) == len(saved["indices"].unique()) == 20
        assert saved["indices"].min() >= 0
        assert saved["indices"].max() < 60
        assert saved["assignments"].shape == (48,)
        assert len(saved["tailness"]) == 3


def test_an_epoch_shows_every_id_image_and_the_sampled_ones_once(make_session):
    method = Stage.open("stage1", make_session()).method
    assert method.begin_epoch(0).tolist() == list(range(48))
    rows = method.begin_epoch(1)
    assert rows[:48].tolist() == list(range(48))
    assert rows[48:].tolist() == (48 + method.chosen).tolist()
    chosen = method.chosen
    method.begin_epoch(2)  # no re-sampling
    assert method.chosen is chosen


def test_rows_are_the_images_they_name(make_session):
    session = make_session()
    batch = session.images(torch.tensor([3, 50, 47, 48]))
    expected = torch.stack([session.data.train.images[3], session.data.ood.images[2], session.data.train.images[47],
                            session.data.ood.images[0]])  # fmt: skip
    assert torch.equal(batch, expected)


def test_the_order_of_an_epoch_comes_from_seed_and_epoch(make_session):
    stage = Stage.open("simclr", make_session())
    rows = torch.arange(48)
    first = torch.cat(stage.batches(rows))
    assert first.sort().values.tolist() == rows.tolist()
    assert torch.equal(first, torch.cat(stage.batches(rows)))
    stage.epoch = 1
    assert not torch.equal(first, torch.cat(stage.batches(rows)))
    other = Stage.open("simclr", make_session(seed=1))
    assert not torch.equal(first, torch.cat(other.batches(rows)))


def test_a_set_smaller_than_a_batch_is_one_batch(make_session):
    stage = Stage.open("simclr", make_session(n_id=12))
    assert [len(batch) for batch in stage.batches(torch.arange(12))] == [12]


def test_warmup_is_nt_xent_on_id_alone_and_then_both_losses(make_session, tmp_path):
    train(make_session(), "stage1")
    lines = read_history(tmp_path / "stage1" / "history.jsonl")
    assert lines[0]["parts"] == {}
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(line["parts"]["psd"] + 0.3 * line["parts"]["domain"], rel=1e-4)
        assert 0 <= line["neighbor_purity"] <= 1


@pytest.mark.parametrize("strategy", ["none", "random"])
def test_the_oracles_neighbors_are_all_right(strategy, make_session, tmp_path):
    """Neighbours of the row's own class by the labels, OOD rows among themselves; the losses are the method's."""
    train(make_session(stage1__neighbors="oracle", stage1__ood_strategy=strategy), "stage1")
    for line in read_history(tmp_path / "stage1" / "history.jsonl")[1:]:
        assert line["neighbor_purity"] == 1.0
        domain = 0.3 * line["parts"]["domain"] if strategy == "random" else 0.0
        assert line["loss"] == pytest.approx(line["parts"]["psd"] + domain, rel=1e-4)


@pytest.mark.parametrize("neighbors", ["in_batch", "queue", "dataset"])
def test_without_ood_there_is_no_domain_loss(neighbors, make_session, tmp_path):
    options = {"data__ood": "", "stage1__ood_strategy": "none", "stage1__neighbors": neighbors}
    train(make_session(n_ood=0, **options), "stage1")
    lines = read_history(tmp_path / "stage1" / "history.jsonl")
    assert set(lines[-1]["parts"]) == {"psd"}
    assert [line["images"] for line in lines] == [48] * 5


def test_too_many_clusters_are_told_before_the_first_epoch(make_session):
    with pytest.raises(ValueError, match="stage1.clusters must be at most the 48 ID images, got 49"):
        Stage.open("stage1", make_session(stage1__clusters=49))


@pytest.mark.parametrize(("n_ood", "sentence"), [
    (0, "stage1.ood_strategy must be none without an OOD set, got tailness"),
    (12, "stage1.budget must be at most the 12 images of the OOD set, got 20"),
])  # fmt: skip
def test_too_few_ood_images_are_told_before_the_first_epoch(n_ood, sentence, make_session):
    with pytest.raises(ValueError, match=sentence):
        Stage.open("stage1", make_session(n_ood=n_ood))


@pytest.fixture
def searched(monkeypatch):
    """Records the arguments of every call of stage1_loss."""
    import ltood_fast

    calls, real = [], ltood_fast.stage1_loss

    def record(*args, **options):
        calls.append(options)
        return real(*args, **options)

    monkeypatch.setattr(ltood_fast, "stage1_loss", record)
    return calls


def test_in_batch_neighbors_need_no_bank(make_session, searched):
    train(make_session(stage1__neighbors="in_batch"), "stage1")
    assert all("bank" not in call for call in searched)


def test_the_queue_holds_the_batches_before(make_session, searched):
    stage = train(make_session(stage1__neighbors="queue"), "stage1")
    assert all(call["bank"].z.shape == (24, 16) for call in searched)
    assert all(not call["bank"].z.requires_grad for call in searched)
    assert all(call["bank"].ids.shape == call["bank"].domain.shape == (24,) for call in searched)
    assert len(stage.method.positives.bank().ids) == 24


def test_the_data_set_bank_holds_every_image_of_the_epoch(make_session, searched):
    stage = train(make_session(stage1__neighbors="dataset"), "stage1")
    rows = torch.cat([torch.arange(48), 48 + stage.method.chosen])
    last = searched[-1]
    assert torch.equal(last["bank"].ids, rows)
    assert torch.equal(last["bank"].domain, (rows >= 48).long())
    assert len(last["bank"].z) == 68


def test_neighbor_weights_fall_with_sparsity(make_session, searched):
    stage = train(make_session(stage1__neighbor_weighting="density", stage1__neighbor_weight=0.5), "stage1")
    weight = stage.method.positives.weight[:48]
    assert weight.min() == 0.0
    assert weight.max() == 0.5
    assert len(weight.unique()) == 48
    assert len(searched[-1]["neighbor_weight"].unique()) > 8  # one for each image of a batch of 16
    plain = train(make_session(stage1__neighbor_weight=0.5, stage1__epochs=4), "simclr")
    assert Stage1(plain.session, plain.model).positives.weight.unique().tolist() == [0.5]


@pytest.mark.parametrize("weighting", ["gate", "mutual"])
def test_gated_images_keep_their_weight_and_the_others_have_none(weighting, make_session, searched):
    options = {"stage1__neighbor_weighting": weighting, "stage1__neighbor_weight": 0.5, "stage1__gate": 0.25}
    stage = train(make_session(**options), "stage1")
    trained_on = torch.cat([torch.arange(48), 48 + stage.method.chosen])
    weight = stage.method.positives.weight[trained_on]
    assert weight.unique().tolist() == [0.0, 0.5]
    if weighting == "gate":  # a quarter of each domain: 12 of 48 ID images, 5 of 20 OOD images
        assert [int((part > 0).sum()) for part in weight.split([48, 20])] == [12, 5]
    used = torch.cat([call["neighbor_weight"] for call in searched])
    assert used.unique().tolist() == [0.0, 0.5]


def test_the_sparsest_samples_can_be_the_targets(make_session, tmp_path):
    stage = train(make_session(stage1__targets="samples", stage1__target_samples=6), "stage1")
    for path in (tmp_path / "stage1").glob("resample_*"):
        saved = torch.load(path, weights_only=True)
        assert len(saved["targets"].unique()) == len(saved["tailness"]) == 6
        assert saved["targets"].max() < 48
        assert torch.bincount(saved["index_clusters"], minlength=6).tolist() == [4, 4, 3, 3, 3, 3]  # 20 of 6
        assert saved["assignments"][saved["targets"]].tolist() == list(range(6))
    assert torch.equal(stage.method.chosen, saved["indices"])


def test_stage1_can_go_on_from_simclr(make_session):
    simclr = train(make_session(stage1__init="simclr"), "simclr")
    assert torch.equal(weights(Stage.open("stage1", simclr.session)), weights(simclr))
    assert not torch.equal(weights(Stage.open("stage1", make_session())), weights(simclr))


def test_the_guide_stays_frozen_and_the_student_starts_from_it(make_session):
    session = make_session()
    stage1 = train(session, "stage1")
    stage2 = Stage.open("stage2", session)
    assert torch.equal(weights(stage2), weights(stage1))
    before = copy.deepcopy(stage2.method.guide.network.state_dict())
    stage2.run()
    guide = stage2.method.guide.network
    assert not guide.training
    assert all(not p.requires_grad for p in guide.parameters())
    assert all(torch.equal(x, before[name]) for name, x in guide.state_dict().items())  # BatchNorm's statistics too
    assert not torch.equal(weights(stage2), weights(stage1))


def test_stage2_sees_id_images_alone_and_reports_both_parts(make_session, tmp_path):
    session = make_session()
    train(session, "stage1")
    train(session, "stage2")
    for line in read_history(tmp_path / "stage2" / "history.jsonl"):
        assert line["images"] == 48
        assert line["loss"] == pytest.approx(line["parts"]["guided"] + 0.4 * line["parts"]["distill"], rel=1e-4)


@pytest.mark.parametrize("views", ["augmented", "clean"])
def test_what_the_guide_sees(views, make_session, monkeypatch):
    import ltood_fast

    session = make_session(stage2__guide_views=views)
    train(session, "stage1", epochs=2)
    method = Stage2(session, Stage.open("stage2", session).model)
    given = {}
    real = ltood_fast.stage2_loss
    monkeypatch.setattr(ltood_fast, "stage2_loss", lambda z, guide, *a, **o: (given.update(guide=guide), real(z, guide, *a, **o))[1])  # fmt: skip # noqa: E501
    rows = torch.arange(16)
    method.loss(session.new_model(), session.two_views(rows), rows, 0)
    one, other = given["guide"][:16], given["guide"][16:]
    assert torch.equal(one, other) == (views == "clean")


@pytest.mark.parametrize(("name", "options"), [
    ("simclr", {}),
    ("stage1", {}),
    ("stage1", {"stage1__neighbors": "queue", "stage1__neighbor_weighting": "density"}),
    ("stage1", {"stage1__neighbors": "dataset", "stage1__ood_strategy": "random"}),
    ("stage1", {"stage1__targets": "samples", "stage1__neighbor_weighting": "mutual"}),
    ("stage2", {}),
])  # fmt: skip
def test_a_stage_that_is_resumed_ends_in_the_same_weights(name, options, make_session, tmp_path):
    """Stopped after every possible number of epochs, new objects each time."""
    whole = make_session(run_dir=tmp_path / "whole", **options)
    parts = make_session(run_dir=tmp_path / "parts", **options)
    if name == "stage2":
        for session in (whole, parts):
            train(session, "stage1", epochs=2)
    expected = train(whole, name)
    for _ in range(expected.method.epochs):
        train(parts, name, epochs=1)
    assert torch.equal(weights(Stage.open(name, parts)), weights(expected))


def in_old_form(state):
    """The state of stage 1 as checkpoints held it when the stage was one class."""
    positives, tailness = state.pop("positives"), state.pop("tailness")
    is_queue = positives["bank"] is not None and len(positives["bank"]["ids"]) == 24
    places = {"bank": None, "queue": positives["bank"]} if is_queue else {"bank": positives["bank"], "queue": None}
    return {**state, "row_weight": positives["weight"], **places, **tailness}


@pytest.mark.parametrize("options", [
    {"stage1__neighbors": "queue", "stage1__neighbor_weighting": "density"},
    {"stage1__neighbors": "dataset", "stage1__neighbor_weighting": "gate"},
    {"stage1__tailness": "momentum"},
])  # fmt: skip
def test_a_checkpoint_of_the_old_form_is_resumed(options, make_session, tmp_path):
    whole, parts = (make_session(run_dir=tmp_path / run, **options) for run in ("whole", "parts"))
    expected = train(whole, "stage1")
    train(parts, "stage1", epochs=3)
    path = tmp_path / "parts" / "stage1" / "last.pt"
    state = load_checkpoint(path)
    state["method"] = in_old_form(state["method"])
    assert not {"positives", "tailness"} & state["method"].keys()
    save_checkpoint(path, parts.config, **{key: state[key] for key in FIELDS.keys() - {"config"}})
    assert torch.equal(weights(train(parts, "stage1")), weights(expected))


def test_a_finished_stage_is_marked_and_its_history_is_whole(make_session, tmp_path):
    session = make_session()
    train(session, "simclr")
    assert load_checkpoint(tmp_path / "simclr" / "last.pt", session.config)["finished"]
    assert Stage.open("simclr", session).finished
    assert [line["epoch"] for line in read_history(tmp_path / "simclr" / "history.jsonl")] == [0, 1]
    assert list((tmp_path / "tensorboard" / "simclr").glob("events*"))


def test_a_resumed_history_ends_with_its_checkpoint(make_session, tmp_path):
    session = make_session()
    train(session, "simclr", epochs=1)
    (tmp_path / "simclr" / "history.jsonl").write_text('{"epoch": 0, "loss": 1}\n{"epoch": 1, "loss": 2}\n')
    train(session, "simclr")
    lines = read_history(tmp_path / "simclr" / "history.jsonl")
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0]["loss"] == 1
    assert lines[1]["loss"] != 2


def test_a_diverging_run_keeps_its_checkpoint(make_session, tmp_path):
    session = make_session(optim__lr=0.05, simclr__epochs=4)
    train(session, "simclr", epochs=2)
    before = (tmp_path / "simclr" / "last.pt").read_bytes()
    stage = Stage.open("simclr", session)
    with torch.no_grad():
        stage.model.head[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="loss must be finite, got nan in simclr, epoch 2, step 0"):
        stage.run()
    assert (tmp_path / "simclr" / "last.pt").read_bytes() == before


def test_weights_that_an_infinite_last_step_left_are_not_saved(make_session, tmp_path, monkeypatch):
    session = make_session(simclr__epochs=4)
    stage = Stage.open("simclr", session)
    real = stage.train_epoch

    def poisoned(bar):
        line = real(bar)
        with torch.no_grad():
            stage.model.head[0].weight[0, 0] = float("inf")
        return line

    monkeypatch.setattr(stage, "train_epoch", poisoned)
    with pytest.raises(TrainingError, match="weights must be finite, got inf in simclr after epoch 0"):
        stage.run()
    assert not (tmp_path / "simclr" / "last.pt").exists()


def test_batch_norm_learns_in_training_and_not_in_embedding(make_session):
    session = make_session()
    stage = Stage.open("simclr", session)
    mean = stage.model.head[1].running_mean
    assert mean.abs().sum() == 0
    stage.train_epoch(NoBar())
    trained = mean.clone()
    assert trained.abs().sum() > 0
    stage.model.train()
    session.embed(stage.model, session.data.train.images)
    assert torch.equal(mean, trained)
    assert stage.model.training


def test_bf16_trains(make_session):
    session = make_session(run__precision="bf16-mixed", simclr__epochs=1)
    stage = train(session, "simclr")
    assert stage.model.head[0].weight.dtype == torch.float32
    with session.fabric.autocast():
        assert stage.model.head[0](torch.randn(2, 32)).dtype == torch.bfloat16


def test_a_device_that_is_not_there(monkeypatch):
    from ltood_fast.train.session import make_fabric

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="run.device must be a device of this machine, got cuda"):
        make_fabric(load_config("smoke", {"run.device": "cuda"}).run)


def test_a_guide_of_another_run_is_as_good_as_ones_own(make_session, tmp_path):
    train(make_session(), "stage1")
    own = train(make_session(), "stage2").model.state_dict()
    guide = tmp_path / "guide.pt"
    (tmp_path / "stage1" / "last.pt").rename(guide)
    shutil.rmtree(tmp_path / "stage2")
    other = train(make_session(stages="stage2", stage2__guide=str(guide)), "stage2").model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_guide_of_another_network_is_one_sentence(make_session, tmp_path):
    train(make_session(), "stage1")
    session = make_session(
        stages="stage2", stage2__guide=str(tmp_path / "stage1" / "last.pt"), model__out=8, model__channels_last=True
    )
    with pytest.raises(CheckpointError, match="must be of this run's network, got another out$"):
        Stage.open("stage2", session)


@pytest.mark.parametrize("strategy", ["tailness", "random"])
def test_distinct_ood_images_are_counted(strategy, make_session, tmp_path):
    """The images of all choices so far, each once; a resumed run goes on counting."""
    options = {"stage1__ood_strategy": strategy, "stage1__epochs": 6, "stage1__warmup_epochs": 1}
    train(make_session(**options), "stage1", epochs=4)
    train(make_session(**options), "stage1")
    seen, expected = set(), [0]
    for epoch in range(1, 6):
        if (path := tmp_path / "stage1" / f"resample_{epoch:04d}.pt").exists():
            seen |= set(torch.load(path, weights_only=True)["indices"].tolist())
        expected.append(len(seen))
    last = read_history(tmp_path / "stage1" / "history.jsonl")
    assert [line["ood_distinct"] for line in last] == expected[-len(last) :]
    assert expected[-1] > 20  # more than one choice


def test_a_branch_starts_from_another_runs_weights(make_session, tmp_path):
    trunk = train(make_session(tmp_path / "trunk", stages="simclr"), "simclr")
    path = tmp_path / "trunk/simclr/last.pt"
    options = {"stages": "stage1", "stage1__init_from": path}
    branch = Stage.open("stage1", make_session(tmp_path / "branch", **options))
    assert torch.equal(weights(branch), weights(trunk))
    fresh = Stage.open("stage1", make_session(tmp_path / "fresh", stages="stage1"))
    assert not torch.equal(weights(fresh), weights(trunk))
    wider = make_session(tmp_path / "wider", model__out=8, **options)
    with pytest.raises(CheckpointError, match=f"{path} must be of this run's network, got another out"):
        Stage.open("stage1", wider)
    with pytest.raises(CheckpointError, match="another out"):
        check_run(wider)


@pytest.fixture
def weighed(monkeypatch):
    """The arguments of every call of stage1_loss: the weights, the domains, the pairing and the rows of the bank."""
    import ltood_fast

    calls, real = [], ltood_fast.stage1_loss

    def record(z, domain, *args, **options):
        bank = options.get("bank")
        calls.append((options["neighbor_weight"].clone(), domain, options["pairing"], None if bank is None else bank.z))
        return real(z, domain, *args, **options)

    monkeypatch.setattr(ltood_fast, "stage1_loss", record)
    return calls


def test_neighbors_weigh_from_an_epoch_on(make_session, weighed):
    train(make_session(stage1__neighbor_start_epoch=3, stage1__neighbor_weight=0.5), "stage1")
    per_epoch = [{float(w) for weight, *_ in weighed[4 * e : 4 * e + 4] for w in weight} for e in range(4)]
    assert per_epoch == [{0.0}, {0.0}, {0.5}, {0.5}]  # epochs 1 to 4


def test_ood_images_may_go_without_neighbors(make_session, weighed):
    train(make_session(stage1__ood_neighbors=False), "stage1")
    for weight, domain, *_ in weighed:
        assert torch.equal(weight, (domain == 0).float())
    assert any(bool((domain == 1).any()) for _, domain, *_ in weighed)


def test_the_pairing_is_handed_on(make_session, weighed):
    train(make_session(stage1__pairing="cross"), "stage1")
    assert {pairing for _, _, pairing, _ in weighed} == {"cross"}


@pytest.mark.parametrize(("renewal", "distinct"), [("resampling", 2), ("epoch", 4)])
def test_a_bank_is_renewed_when_it_is_to_be(renewal, distinct, make_session, weighed, tmp_path):
    """4 epochs with neighbours, two choices of OOD images; the bank then holds what the network sees at that time."""
    session = make_session(stage1__neighbors="dataset", stage1__bank_renewal=renewal)
    stage = train(session, "stage1", epochs=4)
    stage.method.begin_epoch(4)  # no re-sampling
    bank = stage.method.positives.bank()
    assert len(bank.z) == 48 + 20
    fresh = torch.cat([session.embed(stage.model, session.data.train.images)[1],
                       session.embed(stage.model, session.data.ood.images[stage.method.chosen])[1]])  # fmt: skip
    assert torch.equal(bank.z, fresh) == (renewal == "epoch")
    weighed.clear()
    options = {"stage1__neighbors": "dataset", "stage1__bank_renewal": renewal}
    train(make_session(tmp_path / "whole", **options), "stage1")
    assert len({bank.numpy().tobytes() for *_, bank in weighed}) == distinct


@pytest.mark.parametrize("stage", ["simclr", "stage1"])
def test_the_temperature_follows_its_cosine(stage, make_session, monkeypatch):
    """[Kukleva 2023]: from 1 down to 0.1 after half a period of 8 epochs, and up again; of every loss of the stage."""
    import ltood_fast

    used = []

    def spy(name):
        real = getattr(ltood_fast, name)

        def record(*args, **options):
            used.append(float(args[1 + (name == "stage1_loss")]))
            return real(*args, **options)

        return record

    for name in ("nt_xent", "stage1_loss"):
        monkeypatch.setattr(ltood_fast, name, spy(name))
    options = {f"{stage}__epochs": 10, "stages": stage, "stage1__warmup_epochs": 3, "optim__batch_size": 100}
    cosine = {"base__temperature_schedule": "cosine", "base__temperature_period": 8}
    train(make_session(**options, **cosine), stage)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(10)]
    assert used == pytest.approx(expected)
    assert used[::4] == pytest.approx([1.0, 0.1, 1.0])


def test_a_schedule_needs_a_low_below_its_high():
    with pytest.raises(ConfigError, match=r"base.temperature_low must be at most base.temperature_high = 0.5, got 0.7"):
        load_config("smoke", {"base.temperature_low": "0.7", "base.temperature_high": "0.5"})
