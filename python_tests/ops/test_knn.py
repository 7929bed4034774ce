"""The knn kernel against the float64 reference fed the same (rounded) inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ltood_fast
from ltood_fast.reference import neighbors as reference
from python_tests.tolerances import LOSS

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (2, 1, 1),  # the least: one other row
    (3, 2, 2),  # all others, fewer rows than a block
    (17, 3, 3),  # odd, less than a vector
    (33, 10, 17),  # two blocks of 32, the second with one row
    (127, 5, 129),  # one off a power of two
    (1000, 10, 127),  # 16 blocks and rounds, the last block short
    (400, 399, 5),  # lists as long as can be
    (129, 7, 2048),  # widest rows
]


def backend_for(device, *inputs):
    """The kernel of the device; float64 on CUDA has none."""
    double = any(x is not None and x.dtype == torch.float64 for x in inputs)
    return "auto" if double and device.type == "cuda" else device.type


def check(x, k, y=None, normalize=True, device=CPU):
    """Cosines are those of the reference; where indices differ, the rows tie to within the rounding."""
    on_device = (x.to(device), None if y is None else y.to(device))
    backend = backend_for(device, x, y)
    cosines, indices = ltood_fast.knn(on_device[0], k, y=on_device[1], normalize=normalize, backend=backend)
    cosines, indices = cosines.cpu(), indices.cpu()
    wide = (x.double(), None if y is None else y.double())
    expected, expected_indices = reference.knn(wide[0], k, y=wide[1], normalize=normalize)
    exact = torch.float64 in (x.dtype, x.dtype if y is None else y.dtype)
    assert cosines.dtype == (torch.float64 if exact else torch.float32)
    assert indices.dtype == torch.int64
    tolerance = LOSS[cosines.dtype] * expected.abs().max()
    assert (cosines - expected).abs().max() <= tolerance
    assert (cosines.diff(dim=1) <= 0).all()
    queries, base = (
        torch.nn.functional.normalize(a) if normalize else a for a in (wide[0], wide[0] if y is None else wide[1])
    )
    found = (queries[:, None] * base[indices]).sum(2) if len(x) * k * x.shape[1] < 1e7 else expected
    assert (found - expected).abs().max() <= tolerance
    assert (indices == expected_indices).float().mean() > (0.999 if exact else 0.99)
    assert all(len(set(row)) == k for row in indices.tolist())
    if y is None:
        assert (indices != torch.arange(len(x))[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    n, k, d = shape
    x = torch.randn(n, d, dtype=torch.float64)
    if d == 1:
        x = x.abs() + torch.arange(n)[:, None]
    check(
        x.to(dtype), k, normalize=d > 3, device=device
    )  # few directions are distinct in 1 to 3 dimensions: inner products there


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "q", "k"),
    [
        (1, 1, 1),  # the least
        (3, 1000, 10),  # few queries, several blocks of y
        (1000, 17, 17),  # all of y, several blocks of queries
        (300, 257, 5),  # a last block of one row
    ],
)
def test_other_rows(n, q, k, dtype, device):
    check(torch.randn(n, 33).to(dtype), k, torch.randn(q, 33).to(dtype), device=device)


def test_mixed_dtypes(device):
    x, y = torch.randn(20, 9), torch.randn(30, 9)
    check(x.bfloat16(), 4, y, device=device)
    check(x.bfloat16(), 4, y.half(), device=device)
    check(x, 4, y.double(), device=device)


def copies(n, d, dtype=torch.float32):
    """Copies of 10 rows all over the tiles, and the number of each."""
    kind = (torch.arange(n) % 10)[torch.randperm(n)]
    return torch.randn(10, d, dtype=dtype)[kind], kind


@pytest.mark.parametrize("n", [300, 1200])
@pytest.mark.parametrize("d", [1, 5, 64])
def test_equal_rows_tie_exactly_in_float64(n, d):
    """The first four of the other copies, also where a row is a single number and its cosines are 1 and -1."""
    x, kind = copies(n, d, torch.float64)
    kind = kind if d > 1 else x[:, 0].sign()
    same = (kind[:, None] == kind).fill_diagonal_(False)
    assert torch.equal(ltood_fast.knn(x, 4)[1], same.int().sort(dim=1, descending=True, stable=True).indices[:, :4])


@pytest.mark.parametrize("n", [100, 777, 3000])
@pytest.mark.parametrize("d", [2, 17, 129, 1000])
def test_equal_rows_tie_exactly(n, d, device):
    """A rounding that depends on the place in a tile would mix their order."""
    x, kind = copies(n, d)
    members = [(kind == c).nonzero()[:, 0] for c in range(10)]
    expected = torch.stack([members[c][members[c] != i][:4] for i, c in enumerate(kind.tolist())])
    x = x.to(device)
    assert torch.equal(ltood_fast.knn(x, 4)[1].cpu(), expected)
    expected = torch.stack([members[c][:4] for c in kind.tolist()])
    assert torch.equal(ltood_fast.knn(x, 4, y=x)[1].cpu(), expected)


def test_all_rows_equal():
    """Every pair ties: each row's neighbours are the first others."""
    for value in (0.0, 1.0):
        _, indices = ltood_fast.knn(torch.full((400, 3), value), 3)
        assert indices[:4].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
        assert (indices[4:] == torch.arange(3)).all()


def test_zero_rows(device):
    x = torch.randn(50, 7)
    x[[3, 30]] = 0
    check(x.double(), 5, device=device)
    assert (ltood_fast.knn(x.to(device), 49)[0][3] == 0).all()


@pytest.mark.parametrize("y_given", [False, True])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_rows(broken, y_given, device):
    """A row with NaN or infinity has NaN similarities, which rank first by index, as in the reference."""
    x = torch.randn(400, 5)
    x[[7, 300], 2] = broken
    y = x.flip(0) if y_given else None
    expected = reference.knn(x, 4, y=y)
    got = [a.cpu() for a in ltood_fast.knn(x.to(device), 4, y=None if y is None else y.to(device))]
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[0].isnan(), expected[0].isnan())
    assert got[0][:, 0].isnan().all()
    assert got[0].isnan().sum() == 398 * 2 + 2 * 4  # two broken columns each, and the broken rows themselves
    with pytest.raises(ValueError, match="NaN or Inf in row 7"):
        ltood_fast.knn_density(x.to(device), 4)


def test_minus_infinity_is_no_neighbour():
    y = torch.tensor([[-torch.inf, 0.0], [0.0, 1.0]])
    cosines, indices = ltood_fast.knn(torch.tensor([[1.0, 1.0]]), 2, y=y, normalize=False)
    assert indices.tolist() == [[1, -1]]
    assert cosines.tolist() == [[1.0, -torch.inf]]


@pytest.mark.parametrize("scale", [1e30, 1e-5])
def test_norms_far_from_one(scale, device):
    """Squares of such norms leave float32."""
    x = torch.randn(60, 9).to(device)
    assert torch.equal(ltood_fast.knn(x * scale, 5)[1], ltood_fast.knn(x, 5)[1])
    check(1e4 * x.cpu(), 5, normalize=False, device=device)


def test_layouts():
    x, y = torch.randn(40, 10), torch.randn(30, 10)
    strided_x, strided_y = torch.randn(80, 20)[::2, ::2], torch.randn(10, 30).T
    strided_x.copy_(x)
    strided_y.copy_(y)
    for got, want in zip(ltood_fast.knn(strided_x, 3, y=strided_y), ltood_fast.knn(x, 3, y=y), strict=True):
        assert torch.equal(got, want)


def test_inputs_stay_and_carry_no_gradient():
    x = torch.randn(40, 10, requires_grad=True)
    before = x.detach().clone()
    cosines, indices = ltood_fast.knn(x, 3, y=torch.randn(20, 10, requires_grad=True))
    assert not cosines.requires_grad
    assert not indices.requires_grad
    assert not ltood_fast.knn_density(x, 3).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("n", [20, 300, 1500])  # one block, several, several of full size
def test_threads_give_the_same_bits(n):
    x, y = torch.randn(n, 65), torch.randn(100, 65)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((*ltood_fast.knn(x, 9), *ltood_fast.knn(x, 9, y=y)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, y = torch.randn(20, 5).to(dtype), torch.randn(9, 5, requires_grad=True)
    for arguments in ({"x": x, "k": 3}, {"x": x, "y": y, "k": 3, "normalize": False}):
        torch.library.opcheck(torch.ops.ltood_fast.knn.default, (), arguments)


def test_compile_and_export():
    def search(x, y):
        return *ltood_fast.knn(x, 3), *ltood_fast.knn(x, 2, y=y), ltood_fast.knn_density(x, 3)

    class Search(torch.nn.Module):
        def forward(self, x, y):
            return search(x, y)

    compiled = torch.compile(search, fullgraph=True, dynamic=True)
    for n in (50, 61):
        x, y = torch.randn(n, 8), torch.randn(20, 8)
        expected = search(x, y)
        for got, want in zip(compiled(x, y), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-6)
    for got, want in zip(torch.export.export(Search(), (x, y)).module()(x, y), expected, strict=True):
        assert torch.equal(got, want)


def test_autocast():
    x = torch.randn(50, 8)
    expected = ltood_fast.knn(x, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(ltood_fast.knn(x, 3), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_density_and_tailness(dtype, device):
    x, assignments = torch.randn(300, 9, dtype=dtype), torch.randint(0, 6, (300,))
    on_device, backend = (x.to(device), assignments.to(device)), backend_for(device, x)
    density = ltood_fast.knn_density(on_device[0], 7, backend=backend).cpu()
    expected = reference.knn_density(x.double(), 7)
    assert density.dtype == dtype
    assert ((density - expected).norm() / expected.norm()) < LOSS[dtype]
    tailness = ltood_fast.cluster_tailness(*on_device, 8, k=7, backend=backend).cpu()
    assert torch.equal(tailness.isnan(), torch.arange(8) >= 6)
    expected = reference.cluster_tailness(x.double(), assignments, 6, k=7)
    assert ((tailness[:6] - expected).norm() / expected.norm()) < LOSS[dtype]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 200),
    q=st.integers(0, 200),
    d=st.integers(1, 40),
    levels=st.integers(1, 3),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_fuzz(n, q, d, levels, data, seed):
    """Small integers: products are exact, and most of them tie."""
    torch.manual_seed(seed)
    n = max(n, 2) if q == 0 else n
    k = data.draw(st.integers(1, n - 1 if q == 0 else q))
    x = torch.randint(-levels, levels + 1, (n, d)).float()
    y = torch.randint(-levels, levels + 1, (q, d)).float() if q else None
    got, expected = (f.knn(x, k, y=y, normalize=False) for f in (ltood_fast, reference))
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_operator_refuses_what_would_read_out_of_bounds():
    x, op = torch.randn(10, 4), torch.ops.ltood_fast.knn
    with pytest.raises(ValueError, match="^knn: y must be a non-empty matrix as wide as x, got shape"):
        op(x, x[:, :3], k=2)
    for k, y in ((0, None), (10, None), (11, x)):
        with pytest.raises(ValueError, match=r"^knn: k must be in \[1, \d+\], the rows that can be found, got"):
            op(x, y, k=k)
    with pytest.raises(TypeError, match="^knn: x must be a float tensor, got Int"):
        op(x.int(), k=2)
