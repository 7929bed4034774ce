"""The contrastive launchers on the simulated device: NumPy does what contrastive/cuda/glue.cpp does with torch."""

import ctypes as C
import math

import numpy as np
from cuda_sim.structs import ELEMENT_TYPES, Operand, SegmentSumsParams, bf16_values, prepare

pointer = C.c_void_p


class Exponents(C.Structure):
    _fields_ = [("inv_tau", C.c_float), ("temperature", pointer), ("online", C.c_int)]


class NeighborRules(C.Structure):
    _fields_ = [("views", C.c_int), ("instance", pointer), ("domain", pointer)]


class SolePairs(C.Structure):
    _fields_ = [("half", C.c_int), ("partner", pointer)]


class SegmentPairs(C.Structure):
    _fields_ = [("n", C.c_int), ("ids", pointer), ("sorted", pointer), ("order", pointer), ("partner", pointer)]


class TrianglePlan(C.Structure):
    _names = "tiles row_tiles col_tiles strips chunks work_tiles blocks resident shared_bytes stages"
    _fields_ = [(name, C.c_int) for name in _names.split()]


class ContrastiveForward(C.Structure):
    _fields_ = [
        ("u", Operand), ("exponents", Exponents), ("rules", NeighborRules), ("pairs", SolePairs), ("nearest", C.c_int),
        ("plan", TrianglePlan), ("row_sums", pointer), ("col_sums", pointer), ("row_maxima", pointer),
        ("col_maxima", pointer), ("row_nearest", pointer), ("col_nearest", pointer),
    ]  # fmt: skip


class SegmentView(C.Structure):
    _fields_ = [(name, pointer) for name in ("ids", "sorted", "sums", "grad_sums")]


class ContrastiveRows(C.Structure):
    _fields_ = [
        ("u", Operand), ("d", C.c_int), ("exponents", Exponents), ("tiles", ContrastiveForward),
        ("has_views", C.c_int), ("instances", SegmentView), ("classes", SegmentView), ("k", C.c_int),
        ("neighbor_weight", C.c_float), ("neighbor_weights", pointer), ("cosines", pointer), ("indices", pointer),
        ("lse", pointer), ("instance_loss", pointer), ("class_loss", pointer), ("instance_weight", pointer),
        ("class_weight", pointer),
    ]  # fmt: skip


class RowGradients(C.Structure):
    _names = (
        "grad_instance grad_class grad_lse lse instance_weight class_weight",
        "neighbor_weights lse_grad instance_positive_grad neighbor_positive_grad class_positive_grad",
    )
    _fields_ = [
        ("n", C.c_int), *((name, pointer) for name in _names[0].split()), ("neighbor_weight", C.c_float),
        *((name, pointer) for name in _names[1].split()),
    ]  # fmt: skip


class ContrastiveFactors(C.Structure):
    _fields_ = [
        ("u", Operand), ("exponents", Exponents), ("pairs", SolePairs), ("lse", pointer), ("weight", pointer),
        ("largest", pointer), ("factors", pointer),
    ]  # fmt: skip


class ContrastiveLseBwd(C.Structure):
    _fields_ = [
        ("rows", Operand), ("cols", Operand), ("exponents", Exponents), ("diagonal", C.c_int),
        ("row_factors", pointer), ("col_factors", pointer), ("k_splits", C.c_int), ("resident", C.c_int),
        ("shared_bytes", C.c_int), ("stages", C.c_int), ("out", pointer),
    ]  # fmt: skip


class ContrastiveLseBwdCombine(C.Structure):
    _fields_ = [("lse_bwd", ContrastiveLseBwd), ("d", C.c_int), ("largest", pointer), ("out", pointer)]


class ContrastivePartialSums(C.Structure):
    _fields_ = [
        ("x", Operand), ("y", Operand), ("exponents", Exponents), ("diagonal", C.c_int), ("row_blocks", C.c_int),
        ("k_splits", C.c_int), ("k_split_tiles", C.c_int), ("resident", C.c_int), ("shared_bytes", C.c_int),
        ("sums", pointer), ("maxima", pointer), ("lse", pointer),
    ]  # fmt: skip


class ContrastiveBackward(C.Structure):
    _fields_ = [
        ("u", Operand), ("d", C.c_int), ("exponents", Exponents), ("rows", RowGradients), ("largest", pointer),
        ("lse_bwd", ContrastiveLseBwd), ("pairs", SolePairs),
        ("instances", SegmentView), ("classes", SegmentView), ("has_views", C.c_int), ("k", C.c_int),
        ("indices", pointer), ("cosines", pointer), ("chosen_sum", pointer), ("bank", Operand), ("type", C.c_int),
        ("normalize", C.c_int), ("inv_norm", pointer), ("grad_z", pointer), ("u_dot_du", pointer),
    ]  # fmt: skip


def run(dev, name, params):
    error = dev.call(name, params, None)
    assert error == 0, f"{name} returned {error}: {dev.complaint}"


def launch_lse_bwd(dev, lse_bwd, row_factors, col_factors, **plan):
    """The plan, but for what `plan` says otherwise, and the launch; the buffers, which the next launches need."""
    assert dev.call("ltood_plan_contrastive_lse_bwd", lse_bwd) == 0, dev.complaint
    for name, value in plan.items():
        setattr(lse_bwd, name, value)
    lse_bwd.row_factors, lse_bwd.col_factors = row_factors.ptr, col_factors.ptr
    out = dev.empty((lse_bwd.k_splits, lse_bwd.rows.rows, 64 * lse_bwd.rows.k_tiles), np.float32)
    lse_bwd.out = out.ptr
    run(dev, "ltood_launch_contrastive_lse_bwd", lse_bwd)
    return out


def launch_factors(dev, operand, exponents, lse, weight, largest, pairs=None):
    factors = dev.empty((operand.rows, 4), np.float32)
    run(
        dev,
        "ltood_launch_contrastive_factors",
        ContrastiveFactors(operand, exponents, pairs or SolePairs(), lse, weight, largest, factors.ptr),
    )
    return factors


class Simulated:
    """One problem: forward() and then backward(). z [N, D] is taken as `kind`: float32, bfloat16 or float16."""

    def __init__(self, dev, z, temperature, kind="float32", **options):
        self.dev, self.kind, self.temperature, self.options = dev, kind, temperature, options
        self.n, self.d = z.shape
        self.normalize = options.get("normalize", True)
        self.prepared = self.operand(z)
        self.u = self.prepared.operand
        online = options.get("online", not self.normalize or temperature < 0.0229)
        self.on_device = dev.put(np.array([temperature], np.float32)) if options.get("device_temperature") else None
        self.exponents = Exponents(1 / temperature, self.on_device.ptr if self.on_device else None, online)
        self.kept = []

    def operand(self, x):
        return prepare(self.dev, x, self.kind, self.normalize, half=self.kind == "float32" and self.normalize)

    def put(self, array, dtype=None):
        if array is None:
            return None
        self.kept.append(self.dev.put(np.asarray(array, dtype)))
        return self.kept[-1].ptr

    def empty(self, shape, dtype=np.float32):
        self.kept.append(self.dev.empty(shape, dtype))
        return self.kept[-1]

    def segment_sums(self, keys, order, entries_per_row, weight=None):
        dev, d = self.dev, self.d
        sums = dev.zeros((self.n, d))
        self.kept.append(sums)
        n_edges = dev.call("ltood_segment_edges", C.c_int64(len(keys)), restype=C.c_int64)
        edges = self.empty((n_edges, d))
        params = SegmentSumsParams(
            self.u, self.put(keys, np.int64), self.put(order, np.int64), len(keys), entries_per_row, weight, d,
            sums.ptr, edges.ptr,
        )  # fmt: skip
        run(dev, "ltood_launch_segment_sums", params)
        return sums

    def groups(self, labels, positive_grad=None):
        if labels is None:
            return SegmentView()
        _, ids = np.unique(np.asarray(labels), return_inverse=True)
        order = np.argsort(ids, kind="stable")
        sums = self.segment_sums(ids[order], order, 1)
        grad_sums = self.segment_sums(ids[order], order, 1, positive_grad).ptr if positive_grad else None
        return SegmentView(self.put(ids, np.int64), self.put(ids[order], np.int64), sums.ptr, grad_sums)

    def pairs(self, ids):
        """The sole positives: of the rows i and i + N / 2, or of the segments of two rows."""
        if ids is None:
            return SolePairs(self.n // 2)
        _, ids = np.unique(np.asarray(ids), return_inverse=True)
        order = np.argsort(ids, kind="stable")
        partner = self.empty(self.n, np.int32)
        arrays = (self.put(x, np.int64) for x in (ids, ids[order], order))
        run(self.dev, "ltood_launch_contrastive_pairs", SegmentPairs(self.n, *arrays, partner.ptr))
        return SolePairs(0, partner.ptr)

    def plan_only(self):
        tiles = ContrastiveForward(self.u, self.exponents, NeighborRules(), SolePairs(), self.options.get("k", 0))
        assert self.dev.call("ltood_plan_contrastive", tiles) == 0, self.dev.complaint
        return tiles

    def forward(self):
        """(instance_loss, class_loss, lse, indices) where asked for, else None."""
        dev, n, o = self.dev, self.n, self.options
        ids, labels, domain = o.get("instance_ids"), o.get("labels"), o.get("domain")
        self.k, self.views = o.get("k", 0), o.get("views", True)
        rules = NeighborRules(0 if ids is not None else n // 2, self.put(ids, np.int64), self.put(domain, np.int64))
        found = o.get("neighbors")  # (cosines, indices) of another search; else the tiles find the nearest row
        pairs = self.pairs(ids if self.views else labels)
        tiles = ContrastiveForward(self.u, self.exponents, rules, pairs, self.k if found is None else 0)
        assert dev.call("ltood_plan_contrastive", tiles) == 0, dev.complaint
        for name, value in o.get("plan", {}).items():
            setattr(tiles.plan, name, value)
        self.plan = tiles.plan
        rows, cols = (tiles.plan.chunks, n), (tiles.plan.strips, n)
        tiles.row_sums, tiles.col_sums = self.empty(rows).ptr, self.empty(cols).ptr
        tiles.row_maxima, tiles.col_maxima = self.empty(rows).ptr, self.empty(cols).ptr
        tiles.row_nearest, tiles.col_nearest = self.empty((*rows, 2)).ptr, self.empty((*cols, 2)).ptr
        run(dev, "ltood_launch_contrastive_tiles", tiles)
        if found is None:
            self.cosines, self.indices = self.empty((n, self.k)), self.empty((n, self.k), np.int64)
        else:
            self.cosines, self.indices = dev.put(found[0].astype(np.float32)), dev.put(found[1])
        self.lse, self.losses = self.empty(n, np.float64), (self.empty(n), self.empty(n))
        self.weights = self.empty(n, np.float64), self.empty(n, np.float64)
        self.lam = self.put(o.get("neighbor_weights"), np.float64)
        params = ContrastiveRows(
            self.u, self.d, self.exponents, tiles, self.views, self.groups(ids), self.groups(labels), self.k,
            o.get("neighbor_weight", 1.0), self.lam, self.cosines.ptr, self.indices.ptr, self.lse.ptr,
            self.losses[0].ptr, self.losses[1].ptr, self.weights[0].ptr, self.weights[1].ptr,
        )  # fmt: skip
        run(dev, "ltood_launch_contrastive_rows", params)
        get = dev.get
        return (
            get(self.losses[0]) if self.views else None,
            get(self.losses[1]) if labels is not None else None,
            get(self.lse),
            get(self.indices) if self.k else None,
        )

    def backward(self, grad_instance=None, grad_class=None, grad_lse=None):
        """(grad_z, grad_temperature)."""
        dev, n, o = self.dev, self.n, self.options
        ids, labels = o.get("instance_ids"), o.get("labels")
        outputs = [self.empty(n) for _ in range(4)]
        self.rows = RowGradients(
            n, self.put(grad_instance, np.float32), self.put(grad_class, np.float32), self.put(grad_lse, np.float64),
            self.lse.ptr, self.weights[0].ptr, self.weights[1].ptr, o.get("neighbor_weight", 1.0), self.lam,
            *(x.ptr for x in outputs),
        )  # fmt: skip
        run(dev, "ltood_launch_contrastive_row_gradients", self.rows)
        p = ContrastiveBackward(self.u, self.d, self.exponents, self.rows)
        if self.u.is_half:
            p.largest = self.put(np.abs(dev.get(outputs[0])).max(keepdims=True))
        if grad_instance is not None or grad_class is not None:
            p.pairs = self.pairs(ids if grad_instance is not None else labels)
        factors = launch_factors(dev, self.u, self.exponents, self.lse.ptr, outputs[0].ptr, p.largest, p.pairs)
        p.lse_bwd = ContrastiveLseBwd(self.u, self.u, self.exponents)
        self.kept += [factors, launch_lse_bwd(dev, p.lse_bwd, factors, factors, **o.get("bwd_plan", {}))]
        p.has_views = grad_instance is not None
        p.k = self.k if p.has_views else 0
        if p.has_views:
            p.instances = self.groups(ids, outputs[1].ptr)
        if grad_class is not None:
            p.classes = self.groups(labels, outputs[3].ptr)
        bank = o.get("bank")
        if p.k and bank is not None:
            self.bank = self.operand(bank)
            p.bank = self.bank.operand
        elif p.k:
            flat = dev.get(self.indices).reshape(-1)
            order = np.argsort(flat, kind="stable")
            p.chosen_sum = self.segment_sums(flat[order], order, self.k, outputs[2].ptr).ptr
        storage = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}[self.kind]
        grad_z, u_dot_du = self.empty((n, self.d), storage), self.empty(n)
        p.indices, p.cosines, p.normalize = self.indices.ptr, self.cosines.ptr, self.normalize
        p.type = ELEMENT_TYPES[np.dtype(storage)]
        p.inv_norm, p.grad_z, p.u_dot_du = self.prepared.inv_norm.ptr, grad_z.ptr, u_dot_du.ptr
        run(dev, "ltood_launch_contrastive_epilogue", p)
        grad = dev.get(grad_z)
        grad = bf16_values(grad) if self.kind == "bfloat16" else grad
        return grad, -0.5 / self.temperature * math.fsum(dev.get(u_dot_du).astype(np.float64))
