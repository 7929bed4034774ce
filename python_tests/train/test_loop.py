import json
import math

import pytest
import torch

from ltood_fast.train.config import OptimConfig
from ltood_fast.train.history import read_history
from ltood_fast.train.loop import CHECK_EVERY, Meter, Stage, TrainingError, learning_rate, make_optimizer


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    config = OptimConfig(lr=0.5, warmup_epochs=10, min_lr=1e-6)
    assert learning_rate(config, 110, 0.0) == 0.0
    assert learning_rate(config, 110, 5.0) == pytest.approx(0.25)
    assert learning_rate(config, 110, 10.0) == pytest.approx(0.5)
    assert learning_rate(config, 110, 60.0) == pytest.approx(0.25, rel=1e-4)
    assert learning_rate(config, 110, 35.0) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)), rel=1e-4)
    assert learning_rate(config, 110, 110.0) == pytest.approx(1e-6)


def test_learning_rate_without_warmup_or_with_nothing_else():
    assert learning_rate(OptimConfig(lr=0.5, warmup_epochs=0), 10, 0.0) == pytest.approx(0.5)
    assert learning_rate(OptimConfig(lr=0.5, warmup_epochs=10), 4, 2.0) == pytest.approx(0.25)


def test_optimizers_take_their_options():
    model = torch.nn.Linear(2, 2)
    sgd = make_optimizer(model, OptimConfig(momentum=0.8, weight_decay=0.01))
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.8, 0.01)
    adamw = make_optimizer(model, OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01))
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (1e-3, 0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 3, CHECK_EVERY + 2])
def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(bad, step):
    meter = Meter("stage1", 7)
    losses = torch.ones(2 * CHECK_EVERY)
    losses[step] = bad
    with pytest.raises(TrainingError, match=rf"got (nan|inf) in stage1, epoch 7, step {step};"):
        any(meter.add(loss=loss) for loss in losses)


def test_means_leave_out_parts_that_are_not_known():
    meter = Meter("stage1", 0)
    for loss, purity in ((1.0, math.nan), (3.0, 0.5)):
        meter.add(loss=torch.tensor(loss), neighbor_purity=torch.tensor(purity), other=torch.tensor(math.nan))
    meter.flush()
    assert meter.means() == {"loss": 2.0, "neighbor_purity": 0.5, "other": None}


def test_a_history_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text(json.dumps({"epoch": 0}) + "\n" + '{"epoch": 1, "lo')
    assert read_history(path) == [{"epoch": 0}]
    assert read_history(tmp_path / "none") == []


def test_steps_count_epochs_by_their_length(make_session):
    """10 batches of ID images, 15 with OOD ones: 1 epoch of warm-up, 2 before the sampling, 4 after."""
    options = {"stage1__epochs": 6, "stage1__warmup_epochs": 2, "optim__warmup_epochs": 1, "optim__lr": 1.0,
               "optim__schedule": "steps", "optim__batch_size": 4, "stage1__budget": 20}  # fmt: skip
    stage = Stage.open("stage1", make_session(n_id=40, n_ood=60, **options))
    total, warmup = 2 * 10 + 4 * 15, 10
    for epoch, step, done in ((0, 0, 0), (0, 5, 5), (1, 0, 10), (2, 3, 23), (5, 14, 79)):
        stage.epoch = epoch
        rate = stage._set_lr(step, 15)
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
        assert rate == pytest.approx(done / 10 if done < warmup else cosine, abs=2e-6)
        assert stage.optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize(("images", "keep", "sizes"), [
    (48, "keep", [16, 16, 16]),
    (50, "keep", [16, 16, 16, 2]),
    (49, "keep", [16, 16, 16]),  # BatchNorm needs two images
    (50, "drop", [16, 16, 16]),
    (12, "keep", [12]),
])  # fmt: skip
def test_a_last_batch_is_kept_where_it_can_be(images, keep, sizes, make_session):
    stage = Stage.open("simclr", make_session(optim__last_batch=keep, stage2__k=1))
    assert [len(batch) for batch in stage.batches(torch.arange(images))] == sizes


def test_a_kept_batch_has_enough_neighbors(make_session):
    stage = Stage.open("simclr", make_session(optim__last_batch="keep", stage1__k=4, stage2__k=1))
    assert stage.sizes(48 + 2) == [16, 16, 16]  # four views, three others a row
    assert stage.sizes(48 + 3) == [16, 16, 16, 3]
