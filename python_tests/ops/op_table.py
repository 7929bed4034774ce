"""The table of ops: what each takes, what it supports, and the oracle that says what is right.

An op is an `Op`; its `variants` name the options and tensors of a call and why they are there. `sample` makes the
tensors, `disagreement` runs the op on a sample and judges outputs and gradients. The parametrised tests
(`test_op_table.py`) and the fuzz (`python_tests/fuzz`) go over `OPS`: a new op is tested in every way once it has an
oracle and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ltood_fast
from python_tests.oracle import clusters, contrastive, guided, two_sets
from python_tests.oracle.arithmetic import EXACT, Exact, Rounded, Rows, lse_weights, row_weights, wide
from python_tests.oracle.judge import DISTURBED, HEADROOM, compare, row_unit, without_degenerate_rows, wrong_choice
from python_tests.tolerances import GRADIENT, LOSS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REFUSALS = (ValueError, TypeError, RuntimeError)
K = 4  # clusters
Q = 13  # rows of a bank, or candidates beyond the batch


@dataclass(frozen=True)
class Variant:
    why: str
    tensors: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """`tensors`: what every call has. `rows`: the matrices of embeddings, the first of which decides the dtype.
    `differentiable`: what gets a gradient. `bounded`: the row losses cannot be negative, unless they are decoupled."""

    name: str
    oracle: Callable[..., dict]
    variants: tuple[Variant, ...]
    tensors: tuple[str, ...] = ("z", "temperature")
    rows: tuple[str, ...] = ("z",)
    differentiable: tuple[str, ...] = ("z", "temperature")
    views: bool = False  # an odd number of rows needs instance_ids
    lse: bool = False
    neighbors: bool = False  # can return them
    normalize: bool | None = True  # the default; None: not an option
    reduction: bool = True
    bounded: bool = True


@dataclass(frozen=True)
class Sample:
    tensors: dict[str, Any]
    options: dict[str, Any]


WEIGHTS = Variant("one weight a row, some of them 0", ("instance_ids", "neighbor_weight"), {"k": 2})
_GUIDED = ("z", "guide", "clusters", "far", "temperature")
_GUIDED_VARIANTS = (
    Variant("defaults but for k", (), {"k": 2}),
    Variant("several views, forces squared", ("instance_ids",), {"k": 3, "gamma": 2.0}),
    Variant("neighbours given, some of them none", ("pos_idx",), {"k": 1}),
    Variant("forces of 1", ("instance_ids",), {"k": 1, "weighted": False}),
)
_PAIR = ("query", "positive_key", "temperature")
_TOWERS = ("image_features", "text_features")
_IDS = ("query_ids", "key_ids")
_TWO_SETS = (
    Variant("more keys than queries"),
    Variant("both directions", (), {"symmetric": True}),
    Variant("a queue", ("negative_keys",)),
    Variant("few targets", ("target",), {"keys": 3}),
    Variant("ids, both directions", _IDS, {"symmetric": True}),
    Variant("ids of a queue, targets", ("negative_keys", "target", *_IDS)),
    Variant("smoothed, weighted, both directions", ("row_weight",), {"symmetric": True, "label_smoothing": 0.1}),
    Variant("smoothed, weighted, ids of a queue", ("negative_keys", "row_weight", *_IDS), {"label_smoothing": 0.3}),
    Variant("decoupled, ids, both directions", _IDS, {"symmetric": True, "decoupled": True}),
    Variant("decoupled, a queue, weighted", ("negative_keys", "row_weight"), {"decoupled": True}),
)
OPS = {
    op.name: op
    for op in (
        Op(
            "nt_xent", contrastive.nt_xent,
            (
                Variant("two views"), Variant("no, one or several other views", ("instance_ids",)),
                Variant("two views, decoupled", (), {"decoupled": True}),
                Variant("several views, decoupled", ("instance_ids",), {"decoupled": True}),
            ),
            views=True, lse=True,
        ),
        Op(
            "supcon", contrastive.supcon,
            (Variant("negative labels too"), Variant("decoupled", (), {"decoupled": True})),
            ("z", "labels", "temperature"), lse=True,
        ),
        Op(
            "psd_loss", contrastive.psd_loss,
            (
                Variant("defaults"), WEIGHTS,
                Variant("neighbours of the same domain", ("domain",), {"k": 2}),
                Variant("a bank", ("bank",), {"k": 3, "neighbor_weight": 0.5}),
                Variant("a bank with ids and domains", ("instance_ids", "domain", "bank", "bank_ids", "bank_domain")),
                Variant("neighbours of the other view", ("neighbor_weight",), {"k": 2, "pairing": "cross"}),
                Variant("those of the next of several views", ("instance_ids", "domain"), {"pairing": "cross"}),
                Variant("those of the other view in a bank", ("bank", "instance_ids"), {"k": 3, "pairing": "cross"}),
            ),
            rows=("z", "bank"), views=True, lse=True, neighbors=True, bounded=False,
        ),
        Op("domain_loss", contrastive.domain_loss, (Variant("supcon"),), ("z", "domain", "temperature"), lse=True),
        Op(
            "domain_loss bce", contrastive.domain_loss, (Variant("a linear head", (), {"kind": "bce"}),),
            ("z", "domain", "weight", "bias"), differentiable=("z", "weight", "bias"),
        ),
        Op(
            "stage1_loss", contrastive.stage1_loss,
            (
                Variant("defaults"), WEIGHTS,
                Variant("any domain, a bank", ("bank",), {"k": 2, "same_domain": False, "alpha": 1.5}),
                Variant("neighbours of the other view", (), {"k": 2, "pairing": "cross"}),
                Variant("a bank with ids and domains", ("instance_ids", "bank", "bank_ids", "bank_domain"), {"k": 2}),
            ),
            ("z", "domain", "temperature"), ("z", "bank"), views=True, lse=True, neighbors=True, bounded=False,
        ),
        Op(
            "guided_contrastive", guided.guided_contrastive, _GUIDED_VARIANTS, _GUIDED, ("z", "guide"), views=True,
            lse=True,
        ),
        Op(
            "relational_distill", guided.relational_distill,
            (Variant("one temperature"), Variant("the teacher's own", (), {"teacher_temperature": 0.07})),
            ("z", "guide", "temperature"), ("z", "guide"), lse=True,
        ),
        Op(
            "feature_distill", guided.feature_distill, (Variant("defaults"),), ("z", "guide"), ("z", "guide"), ("z",),
            normalize=None,
        ),
        Op(
            "stage2_loss", guided.stage2_loss,
            (*_GUIDED_VARIANTS, Variant("row by row", (), {"k": 2, "distill": "feature", "beta": 2.0})),
            _GUIDED, ("z", "guide"), views=True, lse=True,
        ),
        Op(
            "info_nce", two_sets.info_nce, _TWO_SETS, _PAIR, ("query", "positive_key", "negative_keys"),
            (*_PAIR, "negative_keys"), lse=True,
        ),
        *(
            Op(
                name, oracle, (Variant("defaults"),), (*_TOWERS, "logit_scale", "logit_bias"), _TOWERS,
                (*_TOWERS, "logit_scale", "logit_bias"), normalize=False,
            )
            for name, oracle in (("clip_loss", two_sets.clip_loss), ("sigmoid_loss", two_sets.sigmoid_loss))
        ),
        Op(
            "cluster_kl", clusters.cluster_kl,
            (Variant("with the assignment", (), {"return_q": True}), Variant("heavy tails", (), {"nu": 0.3})),
            ("z", "centroids"), ("z", "centroids"), ("z", "centroids"), normalize=False,
        ),
        Op(
            "refine_centroids", clusters.refine_centroids, (Variant("one step", (), {"steps": 1, "tol": 0.0}),),
            ("z", "centroids"), ("z", "centroids"), (), normalize=False, reduction=False,
        ),
        Op(
            "knn", clusters.knn, (Variant("x itself", (), {"k": 3}), Variant("other rows", ("y",), {"k": 5})),
            ("x",), ("x", "y"), (), reduction=False,
        ),
        Op(
            "knn_density", clusters.knn_density, (Variant("exact", (), {"k": 3}),), ("x",), ("x",), (),
            normalize=None, reduction=False,
        ),
        Op(
            "cluster_tailness", clusters.cluster_tailness,
            (Variant("an empty cluster", (), {"k": 3, "n_clusters": K + 1}),), ("x", "assignments"), ("x",), (),
            normalize=None, reduction=False,
        ),
        Op(
            "farthest_cluster", guided.farthest_cluster, (Variant("defaults"),), ("many_centroids",),
            ("many_centroids",), (), normalize=None, reduction=False,
        ),
        Op(
            "sample_ood", clusters.sample_ood,
            (Variant("half of the candidates", (), {"temperature": 0.7}),), ("candidates", "centroids", "tailness"),
            ("candidates", "centroids"), (), normalize=None, reduction=False,
        ),
    )
}  # fmt: skip

EMBEDDINGS = {
    "query",
    "positive_key",
    "negative_keys",
    "z",
    "guide",
    "bank",
    "x",
    "y",
    "candidates",
    "centroids",
    "many_centroids",
}


def sample(op: Op, variant: Variant, n: int, d: int, dtype: torch.dtype, seed: int, **options: Any) -> Sample:
    """The tensors of a call, from a seed, and its options."""
    g = torch.Generator().manual_seed(seed)
    options = {**variant.options, **options}
    names = {*op.tensors, *variant.tensors}
    if op.views and n % 2:
        names.add("instance_ids")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    def weights() -> Tensor:
        return torch.rand(n, dtype=torch.float64, generator=g).mul(1.3).sub(0.3).clamp(min=0)

    tau = options.pop("tau", 0.3)
    m = n if options.get("symmetric") else options.pop("keys", n + 3)  # rows of positive_key
    columns = Q if "negative_keys" in names else m
    make = {
        "z": lambda: normal(n, d), "guide": lambda: normal(n, d), "x": lambda: normal(n, d),
        "bank": lambda: normal(Q, d), "y": lambda: normal(Q, d), "candidates": lambda: normal(2 * n, d),
        "query": lambda: normal(n, d), "positive_key": lambda: normal(m, d), "negative_keys": lambda: normal(Q, d),
        "image_features": lambda: normal(n, d), "text_features": lambda: normal(n, d),
        "logit_scale": lambda: torch.tensor(3.0, dtype=torch.float64), "logit_bias": lambda: normal(1)[0] - 2,
        "target": lambda: integers(0, m, n), "query_ids": lambda: integers(0, n // 2 + 1, n),
        "key_ids": lambda: integers(0, n // 2 + 1, columns), "row_weight": lambda: weights(),
        "centroids": lambda: normal(K, d), "many_centroids": lambda: normal(n, d), "weight": lambda: normal(d),
        "bias": lambda: normal(1)[0], "temperature": lambda: torch.tensor(tau, dtype=torch.float64),
        "labels": lambda: integers(-2, 3, n), "domain": lambda: integers(0, 2, n),
        "bank_domain": lambda: integers(0, 2, Q), "instance_ids": lambda: integers(0, n // 2 + 1, n),
        "bank_ids": lambda: integers(0, n // 2 + 1, Q), "clusters": lambda: integers(0, K, n),
        "assignments": lambda: integers(0, K, n), "far": lambda: integers(0, K, K),
        "pos_idx": lambda: integers(-1, n, n, 2), "tailness": lambda: normal(K),
        "neighbor_weight": lambda: weights(),
    }  # fmt: skip
    tensors = {name: make[name]() for name in sorted(names)}
    tensors = {name: x.to(dtype) if name in EMBEDDINGS else x for name, x in tensors.items()}
    if "k" in options or op.neighbors:
        most = Q if "bank" in names or "y" in names else n - 1
        options["k"] = max(1, min(options.get("k", 1), most))
    if op.name == "sample_ood":
        options.setdefault("budget", n)
    if op.lse:
        options.setdefault("return_lse", options.get("reduction") == "none")
    return Sample(tensors, options)


def changed(sample: Sample, name: str, change: Callable[[Tensor], Tensor]) -> Sample:
    return Sample({**sample.tensors, name: change(sample.tensors[name])}, sample.options)


def at_magnitude(x: Tensor, largest: float, rows: slice = slice(None)) -> Tensor:
    """The rows scaled so that the largest number of each is `largest`."""
    wide = x.double().clone()
    unit = wide[rows] / wide[rows].abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    wide[rows] = unit * largest
    return wide.to(x.dtype)


def call(op: Op, sample: Sample, **options: Any) -> Any:
    """The public function as a user calls it."""
    given = {**sample.tensors, **sample.options, **options}
    if "bank" in given:
        given["bank"] = ltood_fast.Bank(given["bank"], given.pop("bank_ids", None), given.pop("bank_domain", None))
    if "many_centroids" in given:
        given["centroids"] = given.pop("many_centroids")
    if "query_ids" in given:
        given["exclude"] = ltood_fast.Exclude(given.pop("query_ids"), given.pop("key_ids"))
    if op.name == "info_nce" and "decoupled" in given:
        given["denominator"] = ltood_fast.Denominator(given.pop("decoupled"))
    if "row_weight" in given:
        given["weight"] = given.pop("row_weight")
    if op.neighbors:
        given["return_neighbors"] = True
    return getattr(ltood_fast, op.name.split()[0])(**given)


def named_outputs(op: Op, sample: Sample, result: Any) -> dict[str, Tensor]:
    if op.name == "farthest_cluster":
        return {"far": result}
    single = {"knn_density": "rho", "cluster_tailness": "tailness"}
    pairs = {"knn": ("cosines", "indices"), "sample_ood": ("indices", "cluster")}
    pairs["refine_centroids"] = ("moved", "assignments")
    if op.name in single:
        return {single[op.name]: result}
    if op.name in pairs:
        return dict(zip(pairs[op.name], result, strict=True))
    stages = {"stage1_loss": ("loss", "psd", "domain"), "stage2_loss": ("loss", "guided", "distill")}
    parts = list(result) if type(result) is tuple else [result]
    loss = parts.pop(0)
    named = dict(zip(stages[op.name], loss, strict=True)) if op.name in stages else {"loss": loss}
    for name in ("lse",) * bool(sample.options.get("return_lse")) + ("q",) * bool(sample.options.get("return_q")):
        named[name] = parts.pop(0)
    return named | dict(zip(("cosines", "indices"), parts, strict=True)) if op.neighbors else named


def run(op: Op, sample: Sample, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of the objective that the oracle differentiates."""
    tensors = dict(sample.tensors)
    for name in op.differentiable:
        if isinstance(tensors.get(name), Tensor):
            tensors[name] = tensors[name].detach().requires_grad_()
    found = named_outputs(op, sample, call(op, Sample(tensors, sample.options), **options))
    if not op.differentiable:
        if "moved" in found:
            found["moved"] = (found["moved"].double() - sample.tensors["centroids"].double()).to(found["moved"].dtype)
        return found
    loss = found["loss"]
    n = len(sample.tensors[op.rows[0]])
    objective = (loss * _tensor(row_weights(n), loss)).sum() if loss.dim() else loss
    if "lse" in found:
        objective = objective + (found["lse"] * _tensor(lse_weights(n), loss)).sum()
    leaves = {name: tensors[name] for name in op.differentiable if isinstance(tensors.get(name), Tensor)}
    gradients = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"grad {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return {name: value.detach() for name, value in found.items()}


def _tensor(weights: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(weights.astype(np.float64)).to(like)


def truth(op: Op, sample: Sample, noise: Exact = EXACT, neighbors: Tensor | None = None) -> dict[str, np.ndarray]:
    given = {**sample.tensors, **sample.options}
    given.pop("many_centroids", None)
    if "many_centroids" in sample.tensors:
        given["centroids"] = sample.tensors["many_centroids"]
    if neighbors is not None:
        given["neighbors"] = neighbors.cpu().numpy()
    with np.errstate(all="ignore"):
        return op.oracle(**given, noise=noise)


def lowest_dtype(op: Op, sample: Sample) -> torch.dtype:
    return max((sample.tensors[name].dtype for name in op.rows if name in sample.tensors), key=DTYPES.index)


def disagreement(op: Op, sample: Sample, **options: Any) -> str:
    """ "" if all outputs and gradients are right, else a sentence. An error that the op raises is passed on."""
    return judge(op, sample, run(op, sample, **options))


def judge(op: Op, sample: Sample, found: dict[str, Tensor]) -> str:
    tensors, dtype = sample.tensors, lowest_dtype(op, sample)
    finite = all(bool(x.isfinite().all()) for x in tensors.values() if isinstance(x, Tensor))
    with np.errstate(all="ignore"):
        wrong = _wrong_choices(op, sample, found, dtype) if finite else _wrong_beside_nan(op, sample, found, dtype)
        if wrong:
            return wrong
        neighbors = found["indices"] if op.neighbors and finite else None
        exact = truth(op, sample, neighbors=neighbors) if finite or op.name != "knn" else {}
        for name, value in exact.items():
            if name.startswith("grad ") and not isinstance(tensors[name[5:]], Tensor):
                continue  # a temperature that is a number
            if not found[name].dtype.is_floating_point or found[name].numel() == 0:
                continue
            wrong = _wrong_value(op, sample, name, found[name], [value])
            if wrong:  # beyond the tolerance: is it more than rounding explains?
                noise = [Rounded(torch.finfo(dtype).eps, seed) for seed in range(DISTURBED)]
                truths = [value, *(truth(op, sample, each, neighbors)[name] for each in noise)]
                wrong = _wrong_value(op, sample, name, found[name], truths)
            if wrong:
                return wrong
    bounded = op.bounded and not sample.options.get("decoupled")
    if bounded and "loss" in found and bool((found["loss"] < 0).any()):
        return f"loss: {found['loss'].min().item():.3g} is negative"
    return ""


def _wrong_value(op: Op, sample: Sample, name: str, found: Tensor, truths: list[np.ndarray]) -> str:
    finite = all(bool(x.isfinite().all()) for x in sample.tensors.values() if isinstance(x, Tensor))
    finite &= not _logits_overflow(op, sample)
    unit, normalize = wide(1.0), op.normalize is None or sample.options.get("normalize", op.normalize)
    if name.startswith("grad ") and name[5:] in op.rows and normalize:
        rows = sample.tensors[name[5:]]
        unit = row_unit(rows)
        truths = [without_degenerate_rows(x, rows, found) for x in truths]
    return compare(name, found, truths, lowest_dtype(op, sample), unit=unit, finite=finite)


def _logits_overflow(op: Op, sample: Sample) -> bool:
    if not {"temperature", "logit_scale"} & {*op.tensors} or sample.options.get("normalize", op.normalize):
        return False
    rows = [sample.tensors[name] for name in op.rows if name in sample.tensors]
    scale = (
        wide(sample.tensors["logit_scale"]) if "logit_scale" in op.tensors else 1 / wide(sample.tensors["temperature"])
    )
    longest = max((wide(x) ** 2).sum(1).max(initial=0) for x in rows) * scale
    carrier = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
    return bool(longest * HEADROOM > torch.finfo(carrier).max)


def _wrong_choices(op: Op, sample: Sample, found: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Integer outputs: neighbours, farthest clusters, drawn rows."""
    tensors, options = sample.tensors, sample.options
    normalize = options.get("normalize", True)
    if op.neighbors:
        rows, given = Rows.of(tensors["z"], normalize, EXACT), {**tensors, **options}
        names = ("domain", "bank", "bank_ids", "bank_domain", "instance_ids")
        given = {name: given[name] for name in names if name in given}
        if not options.get("same_domain", True):
            given.pop("domain")
        search = contrastive.Search(rows, **given)
        wrong = wrong_choice(rows, search.searched, search.allowed, found["indices"], dtype)
        off = _wrong_cosines(rows.unit, search.searched.unit, found, dtype) & (found["indices"].cpu().numpy() >= 0)
        return wrong or ("cosines: not those of their indices" if off.any() else "")
    if op.name == "knn":
        x = Rows.of(tensors["x"], normalize, EXACT)
        y = Rows.of(tensors["y"], normalize, EXACT) if "y" in tensors else x
        allowed = np.ones((len(x.given), len(y.given)), dtype=bool)
        return wrong_choice(x, y, allowed if "y" in tensors else allowed & ~np.eye(len(allowed), dtype=bool),
                            found["indices"], dtype)  # fmt: skip
    if op.name == "farthest_cluster":
        rows = Rows.of(tensors["many_centroids"], True, EXACT)
        n = len(rows.given)
        others = ~np.eye(n, dtype=bool)
        return wrong_choice(Rows(-rows.given), rows, others, found["far"][:, None], dtype) if n > 1 else ""
    if op.name == "refine_centroids":
        return _wrong_assignments(sample, found, normalize=options.get("normalize", False), dtype=dtype)
    return _wrong_draw(sample, found, dtype) if op.name == "sample_ood" else ""


def _wrong_cosines(x: np.ndarray, y: np.ndarray, found: dict[str, Tensor], dtype: torch.dtype) -> np.ndarray:
    """[N, k]: where a cosine is not that of its index. It may be infinite where the product exceeds its dtype."""
    exact = np.take_along_axis(x @ y.T, found["indices"].clamp(min=0).cpu().numpy(), 1)
    longest = np.where(np.isfinite(y), y**2, 0).sum(1).max()
    size = np.sqrt((x**2).sum(1, keepdims=True) * longest)
    cosines = wide(found["cosines"])
    overflows = np.isinf(cosines) & (np.sign(cosines) * exact * HEADROOM > torch.finfo(found["cosines"].dtype).max)
    return ~(abs(cosines - exact) <= LOSS[dtype] * size) & ~overflows


def _wrong_beside_nan(op: Op, sample: Sample, found: dict[str, Tensor], dtype: torch.dtype) -> str:
    """The choices of an op that met NaN or Inf. A finite cosine of `knn` must be that of its index."""
    if op.name in ("farthest_cluster", "sample_ood"):
        return "takes NaN or Inf without an error"
    if op.name == "knn":
        x, normalize = sample.tensors["x"], sample.options.get("normalize", True)
        x, y = (Rows.of(rows, normalize, EXACT).unit for rows in (x, sample.tensors.get("y", x)))
        wrong = _wrong_cosines(x, y, found, dtype) & found["cosines"].isfinite().cpu().numpy()
        return "cosines: a finite one of a row with NaN, or a wrong one" if wrong.any() else ""
    return ""


def _wrong_assignments(sample: Sample, found: dict[str, Tensor], *, normalize: bool, dtype: torch.dtype) -> str:
    """The nearest of the returned centroids, to the rounding of a distance."""
    ends = Rows(wide(sample.tensors["centroids"]) + wide(found["moved"]), normalize)
    rows = Rows.of(sample.tensors["z"], normalize, EXACT)
    distance = np.sqrt(((rows.unit[:, None] - ends.unit[None]) ** 2).sum(2))
    chosen = np.take_along_axis(distance, found["assignments"].cpu().numpy()[:, None], 1)[:, 0]
    size = np.sqrt((rows.unit**2).sum(1)) + np.sqrt((ends.unit**2).sum(1)).max()
    far = ~(chosen - distance.min(1) <= GRADIENT[dtype] * size)
    return f"assignments[{far.argmax()}] is not the nearest centroid" if far.any() else ""


def _wrong_draw(sample: Sample, found: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Each cluster's rows are its best of those that no cluster before took."""
    expected, tensors = truth(OPS["sample_ood"], sample), sample.tensors
    _, rest = clusters.budgets(wide(tensors["tailness"]), sample.options["budget"], sample.options["temperature"])
    near_tie = (np.diff(np.sort(rest)) < 1e-9).any()
    cluster = found["cluster"].cpu().numpy()
    if not np.array_equal(cluster, expected["cluster"]):
        return "" if near_tie else f"cluster: {cluster.tolist()[:8]}, truth {expected['cluster'].tolist()[:8]}"
    rows, centers = (Rows.of(tensors[name], True, EXACT) for name in ("candidates", "centroids"))
    free = np.ones((1, len(rows.given)), dtype=bool)
    for c in dict.fromkeys(cluster.tolist()):
        taken = found["indices"][found["cluster"] == c][None, :]
        wrong = wrong_choice(Rows(centers.given[c : c + 1]), rows, free, taken, dtype)
        if wrong:
            return f"cluster {c}: {wrong}"
        free[:, taken.numpy()] = False
    return ""
