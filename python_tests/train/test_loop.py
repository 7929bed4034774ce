import json
import math

import pytest
import torch

from ltood_fast.train.config import OptimConfig
from ltood_fast.train.history import read_history
from ltood_fast.train.loop import CHECK_EVERY, Meter, TrainingError, learning_rate, make_optimizer


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
