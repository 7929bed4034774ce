import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ltood_fast.eval.clustering import cluster_quality
from ltood_fast.eval.evaluate import EvalProtocol, evaluate_features
from ltood_fast.eval.geometry import alignment, uniformity
from ltood_fast.eval.knn import knn_accuracy
from ltood_fast.eval.probe import EpochwiseProbe, Probe, few_shot_rows, linear_probe

C = 5
METHODS = ["logistic", "sgd"]
FAST_SGD = {"epochs": 6, "milestones": (3, 5)}


def blobs(n, distance, features=12, seed=0):
    """n rows around C centres, `distance` times as far from the origin as they scatter."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(C, features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % C
    return distance * centres[labels] + torch.randn(n, features, generator=generator), labels


def sets(distance, n_train=400, n_test=250):
    return (*blobs(n_train, distance, seed=1), *blobs(n_test, distance, seed=2))


@pytest.mark.parametrize("method", METHODS)
def test_separable_classes_are_told_apart(method):
    scores = linear_probe(*sets(5.0), C, Probe(method=method, **FAST_SGD))
    assert scores.accuracy == 1.0
    assert scores.confusion.tolist() == (50 * torch.eye(C, dtype=torch.long)).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_at_chance(method):
    train, labels, test, test_labels = sets(0.0, n_test=1000)
    scores = linear_probe(train, labels, test, test_labels, C, Probe(method=method, **FAST_SGD))
    assert abs(scores.accuracy - 1 / C) < 4 * (0.2 * 0.8 / 1000) ** 0.5  # four standard errors


def test_logistic_agrees_with_an_independent_fit():
    """The same objective, minimised by torch's L-BFGS in float64."""
    train, labels, test, test_labels = sets(0.6)
    scores = linear_probe(train, labels, test, test_labels, C, Probe(l2=1e-2))
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    x, y = (train.double() - mean) / std, F.one_hot(labels, C).double()
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)

    def loss(w):
        w = w.view(C, -1)
        return F.cross_entropy(x @ w.T, y) + 0.5 * 1e-2 * w[:, :-1].square().sum()

    w = torch.zeros(C * x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=999, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return value

    optimizer.step(closure)
    assert w.grad.norm() < 1e-5
    z = torch.cat([(test.double() - mean) / std, torch.ones(len(test), 1)], dim=1)
    answers = (z @ w.view(C, -1).T).argmax(dim=1)
    expected = (answers == test_labels).double().mean().item()
    assert 0.5 < expected < 0.98  # hard enough to tell two fits apart
    assert scores.accuracy == pytest.approx(expected, abs=1.5 / len(test))


def test_sgd_agrees_with_scikit_learns_fit():
    """The source's schedule ends near the optimum of the unregularised loss."""
    from sklearn.linear_model import LogisticRegression

    train, labels, test, test_labels = sets(0.6, n_train=1500, n_test=1000)
    train, test = 0.05 * train, 0.05 * test  # the scale that a rate of 30 is made for
    scores = linear_probe(train, labels, test, test_labels, C, Probe(method="sgd", epochs=15, milestones=(5, 10)))
    fit = LogisticRegression(C=1e6, max_iter=2000).fit(train.numpy(), labels.numpy())
    expected = fit.score(test.numpy(), test_labels.numpy())
    assert 0.5 < expected < 0.98
    assert scores.accuracy == pytest.approx(expected, abs=0.02)


def test_sgd_follows_its_seed_and_no_global_generator():
    arrays = sets(0.3)
    state = torch.get_rng_state()
    first, again, other = (
        linear_probe(*arrays, C, Probe(method="sgd", seed=s, **FAST_SGD)).confusion for s in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_sgd_drops_its_rate_at_the_milestones():
    """A plain loop of momentum SGD, written out, ends in the same answers."""
    train, labels, test, test_labels = sets(0.4, n_train=64)
    probe = Probe(method="sgd", lr=0.5, epochs=4, milestones=(1, 3), batch_size=64)
    scores = linear_probe(train, labels, test, test_labels, C, probe)
    x = torch.cat([train, torch.ones(64, 1)], dim=1)
    w, velocity = torch.zeros(C, 13), torch.zeros(C, 13)
    for rate in (0.5, 0.05, 0.05, 0.005):
        velocity = 0.9 * velocity + (F.softmax(x @ w.T, dim=1) - F.one_hot(labels, C)).T @ x / 64
        w = w - rate * velocity
    answers = (torch.cat([test, torch.ones(len(test), 1)], dim=1) @ w.T).argmax(dim=1)
    expected = torch.zeros(C, C, dtype=torch.long)
    for true, answer in zip(test_labels.tolist(), answers.tolist(), strict=True):
        expected[true, answer] += 1
    assert torch.equal(scores.confusion, expected)


def test_standardisation_makes_the_scale_of_features_irrelevant():
    train, labels, test, test_labels = sets(0.6)
    scale = torch.logspace(-1, 1, 12)
    plain = linear_probe(train, labels, test, test_labels, C, Probe(l2=0.1))
    shifted = linear_probe(train * scale + 3, labels, test * scale + 3, test_labels, C, Probe(l2=0.1))
    assert torch.equal(plain.confusion, shifted.confusion)
    raw = linear_probe(train * scale, labels, test * scale, test_labels, C, Probe(l2=0.1, standardize=False))
    assert not torch.equal(raw.confusion, shifted.confusion)


def test_a_feature_that_is_constant_in_training_changes_nothing():
    train, labels, test, test_labels = sets(0.6)
    plain = linear_probe(train, labels, test, test_labels, C)
    rounding = 1.2e-7 * (torch.arange(len(train)) % 2)  # must not pass for a feature
    train = torch.cat([train, (1 + rounding)[:, None]], dim=1)
    test = torch.cat([test, torch.linspace(-9, 9, len(test))[:, None]], dim=1)
    assert torch.equal(linear_probe(train, labels, test, test_labels, C).confusion, plain.confusion)


def test_a_class_without_images_is_nan_and_never_answered():
    train, labels, test, test_labels = sets(5.0)
    scores = linear_probe(train, labels, test, test_labels, C + 1)
    assert scores.per_class_accuracy[:C].tolist() == [1.0] * C
    assert scores.per_class_accuracy[C].isnan()
    assert scores.confusion[:, C].sum() == 0


def brute_force_knn(train, labels, test, k, temperature):
    train = train.numpy().astype(np.float64)
    test = test.numpy().astype(np.float64)
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    test /= np.linalg.norm(test, axis=1, keepdims=True)
    answers = []
    for row in test:
        cosines = train @ row
        votes = np.zeros(C)
        for j in np.argsort(-cosines, kind="stable")[:k]:
            votes[labels[j]] += np.exp(cosines[j] / temperature)
        answers.append(int(votes.argmax()))
    return answers


@pytest.mark.parametrize(
    ("k", "temperature"),
    [(1, 0.07), (20, 0.07), (400, 0.5), (20, 10.0)],  # one vote, the default, every row votes, nearly equal votes
)
def test_knn_against_brute_force(k, temperature):
    train, labels, test, test_labels = sets(0.5)
    scores = knn_accuracy(train, labels, test, test_labels, C, k=k, temperature=temperature)
    expected = torch.zeros(C, C, dtype=torch.long)
    for true, answer in zip(test_labels.tolist(), brute_force_knn(train, labels, test, k, temperature), strict=True):
        expected[true, answer] += 1
    assert torch.equal(scores.confusion, expected)
    assert scores.accuracy == pytest.approx(expected.diagonal().sum().item() / len(test))


def test_knn_weights_near_neighbours_more():
    """Two near rows of class 0 outvote three far ones of class 1 unless all votes weigh alike."""
    angles = torch.tensor([0.05, -0.05, 1.2, 1.25, 1.3])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    arrays = (train, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert knn_accuracy(*arrays, 2, k=5).accuracy == 1.0
    assert knn_accuracy(*arrays, 2, k=5, temperature=1e6).accuracy == 0.0


@pytest.mark.parametrize("classifier", [linear_probe, knn_accuracy])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda a: a.update(train_labels=a["train_labels"][:-1]),
            r"train_labels must be of shape \[400\], got .*399.*",
        ),
        (lambda a: a.update(test_labels=a["test_labels"] + 1), r"test_labels must be in \[0, 5\), got \[1, 5\]"),
        (lambda a: a.update(train_labels=a["train_labels"] - 1), r"train_labels must be in \[0, 5\), got \[-1, 3\]"),
        (lambda a: a.update(test_features=a["test_features"][:0]), "test_features must be non-empty, got .*"),
        (lambda a: a.update(test_features=a["test_features"][:, :3]), "test_features must be 12 wide as .*, got .*"),
        (lambda a: a["train_features"][3].fill_(torch.nan), "train_features must be finite, got .* 1 of 400 rows"),
        (lambda a: a.update(n_classes=1), "n_classes must be at least 2, got 1"),
    ],
)
def test_bad_input_is_one_sentence(classifier, change, sentence):
    names = ("train_features", "train_labels", "test_features", "test_labels")
    arguments = {**dict(zip(names, sets(1.0), strict=True)), "n_classes": C}
    change(arguments)
    with pytest.raises(ValueError, match=f"^{classifier.__name__}: {sentence}$"):
        classifier(**arguments)


def test_labels_that_are_no_integers():
    train, labels, test, test_labels = sets(1.0)
    with pytest.raises(TypeError, match="^linear_probe: train_labels must be an integer tensor, got torch.float32$"):
        linear_probe(train, labels.float(), test, test_labels, C)


def test_knn_with_more_neighbours_than_rows():
    with pytest.raises(ValueError, match=r"^knn_accuracy: k must be in \[1, 400\], got 401$"):
        knn_accuracy(*sets(1.0), C, k=401)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "ridge"}, "method must be one of logistic, sgd, got 'ridge'"),
        ({"l2": 0}, "l2 must be positive and finite, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_of_the_probe(options, sentence):
    with pytest.raises(ValueError, match=f"^linear_probe: {sentence}$"):
        linear_probe(*sets(1.0), C, Probe(**options))


def test_probe_needs_two_classes_to_learn_from():
    train, labels, test, test_labels = sets(1.0)
    with pytest.raises(
        ValueError, match="^linear_probe: train_labels must be of at least two classes, got class 3 only$"
    ):
        linear_probe(train, torch.full_like(labels, 3), test, test_labels, C)


def test_evaluate_features_groups_both_classifiers():
    train, labels, test, test_labels = sets(0.6)
    kept = torch.arange(len(test)) >= 100  # of 250, so that some classes have fewer
    kept &= ~((test_labels == 0) & (torch.arange(len(test)) % 2 == 0))
    counts = [1, 50, 20, 5, 2]
    stage = evaluate_features(
        "simclr", (train, labels), (test[kept], test_labels[kept]), counts, EvalProtocol(knn_k=10_000)
    )
    probe = linear_probe(train, labels, test[kept], test_labels[kept], C)
    knn = knn_accuracy(train, labels, test[kept], test_labels[kept], C, k=400)
    assert stage.probe["overall"] == pytest.approx(probe.accuracy)
    assert stage.knn["overall"] == pytest.approx(knn.accuracy)
    assert stage.probe["few"] == pytest.approx(probe.per_class_accuracy[0].item())  # C // 3 = 1 class: the smallest
    assert stage.probe["many"] == pytest.approx(probe.per_class_accuracy[[1, 2, 3]].mean().item())
    assert stage.confusion == probe.confusion.tolist()
    assert stage.title == "SimCLR"


def test_few_shot_rows_are_balanced_and_of_the_seed():
    labels = torch.tensor([0, 1, 2] * 20 + [0] * 30)
    rows = few_shot_rows(labels, 3, 5, seed=1)
    assert torch.bincount(labels[rows]).tolist() == [5, 5, 5]
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, few_shot_rows(labels, 3, 5, seed=1))
    assert not torch.equal(rows, few_shot_rows(labels, 3, 5, seed=2))
    assert few_shot_rows(labels, 3, 20).tolist()[:4] != [0, 1, 2, 3]  # of 50 rows of class 0 not the first 20
    with pytest.raises(ValueError, match="^few_shot_rows: per_class must be at most the 20 images of class 1, got 21$"):
        few_shot_rows(labels, 3, 21)


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_features_with_everything(method):
    """The few-shot probe learns from its few images alone, by the schedule of few-shot; the rest is the parts' own."""
    train, labels, test, test_labels = sets(0.5)
    if method == "sgd":  # a scale at which it has not converged: the schedule shows
        train, test = 0.02 * train, 0.02 * test
    rows = few_shot_rows(labels, C, 6)
    views = test + 0.1, test - 0.1
    stage = evaluate_features(
        "stage1", (train, labels), (test, test_labels), [5, 4, 3, 2, 1], EvalProtocol(probe=method, seed=3),
        few_shot=(train[rows], labels[rows]), views=views,
    )  # fmt: skip
    schedule = {"epochs": 100, "milestones": (40, 60)} if method == "sgd" else {}
    few = linear_probe(train[rows], labels[rows], test, test_labels, C, Probe(method=method, seed=3, **schedule))
    assert stage.few_shot["overall"] == pytest.approx(few.accuracy)
    assert stage.few_shot["per_class"] == pytest.approx(few.per_class_accuracy.tolist())
    assert stage.few_shot["many"] == pytest.approx(few.per_class_accuracy[:3].mean().item())
    assert stage.few_shot["overall"] < stage.probe["overall"]
    assert stage.uniformity == uniformity(test)
    assert stage.alignment == alignment(*views)
    assert stage.clustering == cluster_quality(test, test_labels, seed=3)


def test_evaluate_features_leaves_out_what_it_is_not_given():
    train, labels, test, test_labels = sets(0.6)
    stage = evaluate_features("simclr", (train, labels), (test, test_labels), [5, 4, 3, 2, 1])
    assert stage.few_shot is None
    assert stage.alignment is None


def test_the_best_epoch_on_held_out_images_counts():
    """Views of the last epochs show the other class: the classifier after them is wrong, and an earlier one counts."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    rows = torch.randn(60, 4, generator=generator) * 0.1
    rows[:, 0] += 2.0 * labels - 1.0
    seen = []

    def features_of(epoch):
        seen.append(epoch)
        return rows if epoch < 3 else -rows

    epochwise = EpochwiseProbe(features_of, labels, rows[:20], labels[:20])
    probe = Probe("sgd", lr=1.0, epochs=6, milestones=(), batch_size=10)
    picked = linear_probe(rows, labels, rows, labels, 2, probe, epochwise)
    assert seen == list(range(6))
    assert picked.accuracy == 1.0
    wrong = EpochwiseProbe(features_of, labels, -rows[:20], labels[:20])  # held-out images that like the last epochs
    assert linear_probe(rows, labels, rows, labels, 2, probe, wrong).accuracy == 0.0


def test_one_view_and_no_choice_is_the_plain_probe():
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(50, 6, generator=generator), torch.arange(50) % 3
    probe = Probe("sgd", lr=0.1, epochs=1, milestones=())
    plain = linear_probe(rows, labels, rows, labels, 3, probe)
    epochwise = linear_probe(rows, labels, rows, labels, 3, probe, EpochwiseProbe(lambda _: rows, labels, rows, labels))
    assert torch.equal(plain.confusion, epochwise.confusion)


def test_views_need_the_sgd_probe():
    rows, labels = torch.randn(6, 2), torch.arange(6) % 2
    epochwise = EpochwiseProbe(lambda _: rows, labels, rows, labels)
    with pytest.raises(ValueError, match="epochwise must be None but for method sgd without standardize, got logistic"):
        linear_probe(rows, labels, rows, labels, 2, Probe("logistic"), epochwise)
