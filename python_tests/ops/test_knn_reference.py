"""reference.knn against a loop-by-loop NumPy version, and what the public functions do with bad input."""

import sys

import numpy as np
import pytest
import torch

import ltood_fast
from ltood_fast.reference import neighbors as reference


def loops_knn(x, y, k, normalize=True):
    """(cosines, indices), sorting one row at a time by (-cosine, index)."""
    own = y is None
    y = x if own else y
    if normalize:
        x, y = ([row / max(np.sqrt(row @ row), 1e-12) for row in rows] for rows in (x, y))
    cosines, indices = [], []
    for i, xi in enumerate(x):
        scored = sorted(
            (-sum(a * b for a, b in zip(xi, yj, strict=True)), j) for j, yj in enumerate(y) if not (own and i == j)
        )
        cosines.append([-score for score, _ in scored[:k]])
        indices.append([j for _, j in scored[:k]])
    return np.array(cosines), np.array(indices)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("q", [None, 12])
def test_knn_matches_the_loops(k, q, normalize):
    x = torch.randn(11, 5, dtype=torch.float64)
    y = None if q is None else torch.randn(q, 5, dtype=torch.float64)
    cosines, indices = ltood_fast.knn(x, k, y=y, normalize=normalize, backend="reference")
    expected = loops_knn(x.numpy(), None if y is None else y.numpy(), k, normalize)
    np.testing.assert_allclose(cosines.numpy(), expected[0], rtol=1e-10)
    assert indices.tolist() == expected[1].tolist()


def test_row_chunks_join(monkeypatch):
    x = torch.randn(11, 5, dtype=torch.float64)
    whole = reference.knn(x, 4)
    monkeypatch.setattr(reference, "ROWS", 3)
    for got, expected in zip(reference.knn(x, 4), whole, strict=True):
        assert torch.equal(got, expected) if got.dtype == torch.int64 else torch.allclose(got, expected, rtol=1e-14)


def test_ties_go_to_the_lower_index_and_never_to_the_row_itself():
    x = torch.eye(3, dtype=torch.float64)[torch.tensor([0, 1, 0, 0, 1])]
    _, indices = reference.knn(x, 3)
    assert indices.tolist() == [[2, 3, 1], [4, 0, 2], [0, 3, 1], [0, 2, 1], [1, 0, 2]]
    _, indices = reference.knn(x[:1], 3, y=x)
    assert indices.tolist() == [[0, 2, 3]]


def test_zero_rows_and_broken_rows():
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    cosines, indices = reference.knn(x, 2)
    assert indices.tolist() == [[2, 1], [0, 2], [0, 1]]
    assert cosines[1].tolist() == [0.0, 0.0]
    x[1, 0] = torch.nan
    cosines, indices = reference.knn(x, 2)
    assert indices.tolist() == [[1, 2], [0, 2], [1, 0]]
    assert cosines[:, 0].isnan().all()
    assert cosines[2, 1].isfinite()


def test_minus_infinity_is_no_neighbour():
    y = torch.tensor([[-torch.inf, 0.0], [0.0, 1.0]])
    cosines, indices = reference.knn(torch.tensor([[1.0, 1.0]]), 2, y=y, normalize=False)
    assert indices.tolist() == [[1, -1]]
    assert cosines.tolist() == [[1.0, -torch.inf]]


def test_dtypes_and_gradient():
    x = torch.randn(6, 4, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reference.knn(x.to(dtype), 2)[0].dtype == torch.float32
    assert reference.knn(x.double(), 2)[0].dtype == torch.float64
    assert reference.knn(x.bfloat16(), 2, y=x.double())[0].dtype == torch.float64
    assert not reference.knn(x, 2)[0].requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reference.knn(x, 2)[0]
    assert torch.equal(inside, reference.knn(x, 2)[0])


def test_density_and_tailness_match_the_loops():
    x = torch.randn(15, 4, dtype=torch.float64)
    assignments = torch.tensor([0, 1, 3] * 5)
    cosines, _ = loops_knn(x.numpy(), None, 3)
    rho = np.array([sum(1 - c for c in row) / 3 for row in cosines])
    density = ltood_fast.knn_density(x, 3, backend="reference")
    np.testing.assert_allclose(density.numpy(), rho, rtol=1e-10)
    t = ltood_fast.cluster_tailness(x, assignments, 5, k=3, backend="reference").numpy()
    members = [[rho[i] for i in range(15) if assignments[i] == c] for c in range(5)]
    np.testing.assert_allclose(t[[0, 1, 3]], [sum(members[c]) / 5 for c in (0, 1, 3)], rtol=1e-10)
    assert np.isnan(t[[2, 4]]).all()
    given = ltood_fast.cluster_tailness(x, assignments, 5, density=2 * density)
    np.testing.assert_allclose(given.numpy(), 2 * t, rtol=1e-10)


def test_a_broken_row_stays_in_its_cluster():
    density = torch.tensor([1.0, torch.nan, 3.0])
    t = ltood_fast.cluster_tailness(torch.randn(3, 2), torch.tensor([0, 1, 0]), 2, k=1, density=density)
    assert t[0] == 2
    assert t[1].isnan()


def test_sparse_rows_have_high_density_value():
    """Closed form: 8 equal rows have rho 0; a row orthogonal to all others has rho 1."""
    x = torch.eye(2)[torch.tensor([0] * 8 + [1])]
    assert ltood_fast.knn_density(x, 5).tolist() == [0.0] * 8 + [1.0]


def test_ivf_density():
    torch.manual_seed(3)
    x = torch.randn(500, 8)
    exact = ltood_fast.knn_density(x, 5)
    everything = ltood_fast.knn_density(x, 5, method="ivf", n_lists=10, n_probes=10)
    assert torch.allclose(everything, exact, atol=1e-6)  # all lists searched: no longer approximate
    few = ltood_fast.knn_density(x, 5, method="ivf", n_lists=20, n_probes=2)
    assert (few >= exact - 1e-6).all()  # it can only miss neighbours
    assert 0 < (few - exact).mean() < 0.1
    assert ltood_fast.knn_density(x.double(), 5, method="ivf").dtype == torch.float64
    short = ltood_fast.knn_density(x[:40], 30, method="ivf", n_lists=20, n_probes=1)
    assert torch.allclose(short, ltood_fast.knn_density(x[:40], 30), atol=1e-6)  # too few in a list: all are searched
    copies = ltood_fast.knn_density(torch.ones(30, 4), 5, method="ivf", n_lists=1)
    assert copies.abs().max() < 1e-6  # a row that does not find itself among its copies


def test_ivf_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"^knn_density: FAISS cannot be imported \(.*pip install faiss-cpu`$"):
        ltood_fast.knn_density(torch.randn(20, 4), 3, method="ivf")


X = torch.zeros(4, 3)
IDS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "sentence"),
    [
        ("knn", {"x": 1.0}, TypeError, "x must be a tensor, got float"),
        ("knn", {"x": X.long()}, TypeError, "x must be float64, float32, bfloat16 or float16, got torch.int64"),
        ("knn", {"x": X[:, :0]}, ValueError, "x must be non-empty, got shape (4, 0)"),
        ("knn", {"x": X[:1]}, ValueError, "x must be at least 2 rows when no y is given, got shape (1, 3)"),
        ("knn", {"k": 4}, ValueError, "k must be in [1, 3], got 4"),
        ("knn", {"k": 0}, ValueError, "k must be in [1, 3], got 0"),
        ("knn", {"k": 1.0}, TypeError, "k must be an int, got float"),
        ("knn", {"y": X[:2], "k": 3}, ValueError, "k must be in [1, 2], got 3"),
        ("knn", {"y": X[:, :2]}, ValueError, "y must be 3 wide as x is, got shape (4, 2)"),
        ("knn", {"backend": "cuda"}, ValueError, "backend='cuda' needs inputs on a cuda device, got cpu"),
        ("knn_density", {"k": 9}, ValueError, "k must be in [1, 3], got 9"),
        ("knn_density", {"method": "lsh"}, ValueError, "method must be one of exact, ivf, got 'lsh'"),
        ("knn_density", {"method": "ivf", "n_lists": 5}, ValueError, "n_lists must be in [1, 4], got 5"),
        (
            "knn_density",
            {"method": "ivf", "n_lists": 2, "n_probes": 3},
            ValueError,
            "n_probes must be in [1, 2], got 3",
        ),
        ("cluster_tailness", {"k": 4}, ValueError, "k must be in [1, 3], got 4"),
        ("cluster_tailness", {"method": "lsh"}, ValueError, "method must be one of exact, ivf, got 'lsh'"),
        ("cluster_tailness", {"n_clusters": 0}, ValueError, "n_clusters must be at least 1, got 0"),
        (
            "cluster_tailness",
            {"assignments": IDS.float()},
            TypeError,
            "assignments must be an integer tensor, got torch.float32",
        ),
        ("cluster_tailness", {"assignments": IDS[:3]}, ValueError, "assignments must be of shape [4], got shape (3,)"),
        (
            "cluster_tailness",
            {"assignments": IDS + 2},
            ValueError,
            "assignments must be in [0, 2), got [2, 2] without 0, 1; renumber them by "
            "torch.unique(assignments, return_inverse=True)[1]",
        ),
        ("cluster_tailness", {"density": X}, ValueError, "density must be of shape [4], got shape (4, 3)"),
    ],
)
def test_bad_input(function, arguments, error, sentence):
    good = {"x": X, "k": 2, **({"assignments": IDS, "n_clusters": 2} if function == "cluster_tailness" else {})}
    with pytest.raises(error) as raised:
        getattr(ltood_fast, function)(**{**good, **arguments})
    assert str(raised.value) == f"{function}: {sentence}"
