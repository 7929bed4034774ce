"""What guided/cuda/glue.cpp does with torch, done with numpy: the guided family's launchers on a simulated device."""

import ctypes
from ctypes import c_float, c_int, c_void_p
from dataclasses import dataclass

import numpy as np

from python_tests.cuda_sim.structs import Operand, as_type, bf16_bits, check, prepare

SOURCES = ("csrc/ops/guided/cuda/launch.cu", "csrc/ops/guided/cuda/sm90/launch.cu", "csrc/cuda/operand.cu")
FIELDS, SUMS, ROWS, COLUMNS = 10, 8, 128, 64
GRADIENTS = ("grad_loss", "grad_lse", "grad_kl", "grad_student_lse")
KINDS = ("float32", "bfloat16", "float16")  # in the order of ElementType
SELECTION = ("clusters", "far", "keys", "order", "instance", "instance_keys", "members", "neighbors", "neighbor_at",
             "reverse_keys", "reverse_order", "every", "position_of", "self_at", "spans", "fallback", "fallback_tiles",
             "tiles", "fields")  # fmt: skip
OUTPUTS = ("loss", "kl", "weight", "lse", "student_lse", "teacher_lse", "positive_logit", "excess", "gap")


class GuidedParams(ctypes.Structure):
    _fields_ = [
        *((name, Operand) for name in ("z", "e", "v")),
        *((name, c_int) for name in ("n", "d", "k", "clusters_count", "padded", "columns", "first", "diagonal",
                                     "contrast", "distill", "backward", "k_splits", "weighted")),
        *((name, c_float) for name in ("gamma", "inv_tau", "inv_teacher_tau")),
        ("temperature", c_void_p),
        *((name, c_void_p) for name in (*SELECTION, "sums", *OUTPUTS, *GRADIENTS, "gradient", "inv_norm")),
        *((name, c_int) for name in ("normalize", "grad_type")),
        *((name, c_void_p) for name in ("grad_z", "u_dot_du", "contrast_state", "distill_state", "grad_unit")),
    ]  # fmt: skip


def whole_blocks(rows: int) -> int:
    return -(-rows // ROWS) * ROWS


@dataclass
class Problem:
    z: np.ndarray
    guide: np.ndarray
    clusters: np.ndarray | None = None
    far: np.ndarray | None = None
    instance_ids: np.ndarray | None = None
    pos_idx: np.ndarray | None = None
    distill: bool = False
    kind: str = "float32"
    weighted: bool = True
    gamma: float = 1.0
    temperature: float = 0.2
    teacher_temperature: float | None = None
    device_temperature: bool = False
    normalize: bool = True
    splits: int | None = None  # of a float32 operand: 1 as under matmul precision "medium"
    k_splits: int | None = None  # of the columns; None: as many as the launchers choose
    columns: int | None = None  # of a partial problem, whose rows begin at the next multiple of 128; None: a square
    diagonal: int = 0

    @property
    def n(self) -> int:
        return len(self.z)

    @property
    def first(self) -> int:
        return 0 if self.columns is None else whole_blocks(self.columns)

    def rounded(self) -> tuple[np.ndarray, np.ndarray]:
        """z and guide in float64 as the device reads them."""
        return as_type(self.z, self.kind)[1], as_type(self.guide, self.kind)[1]


class GuidedRun:
    """One problem on a device: forward(), then backward() from gradients of its outputs."""

    def __init__(self, dev, problem: Problem):
        self.dev, self.problem, self.buffers = dev, problem, {}
        self.params = GuidedParams()

    def put(self, **arrays):
        for name, array in arrays.items():
            self.buffers[name] = None if array is None else self.dev.put(array)
            setattr(self.params, name, self.buffers[name] and self.buffers[name].ptr)

    def fresh(self, **shapes):
        for name, (shape, dtype) in shapes.items():
            self.buffers[name] = self.dev.empty(shape, dtype)
            setattr(self.params, name, self.buffers[name].ptr)

    def get(self, name: str) -> np.ndarray:
        return self.dev.get(self.buffers[name])

    def launch(self, step: str):
        check(self.dev, self.dev.call(f"ltood_launch_guided_{step}", self.params, None))

    def _order(self):
        """The plan's order, as a stable sort of the keys gives it."""
        x, p = self.problem, self.params
        p.clusters_count, p.k = len(x.far), x.pos_idx.shape[1]
        self.put(clusters=x.clusters, far=x.far)
        self.fresh(keys=(x.n, np.int64))
        self.launch("keys")
        keys = self.get("keys")
        self.order = np.argsort(keys, kind="stable")
        self.put(keys=keys[self.order], order=self.order)
        if x.instance_ids is not None:
            instance = x.instance_ids[self.order]
            members = np.argsort(instance, kind="stable")
            self.put(instance=instance, instance_keys=instance[members], members=members)

    def _plan(self, backward: bool):
        x, p = self.problem, self.params
        p.backward = backward
        blocks, tiles = (p.padded - p.first) // ROWS, p.padded // COLUMNS
        if p.first:
            self.fresh(self_at=(p.padded, np.int32))
        if x.clusters is not None:
            if not backward and p.k:
                self.put(neighbors=x.pos_idx)
            self.fresh(neighbor_at=((x.n, p.k), np.int64), position_of=(x.n, np.int32), spans=((x.n, 4), np.int32),
                       fallback=(x.n, np.uint8), fallback_tiles=(tiles, np.uint8))  # fmt: skip
        self.fresh(tiles=((blocks, -(-tiles // 32)), np.uint32), fields=((FIELDS, p.padded), np.float32))
        self.launch("plan")

    def forward(self) -> dict[str, np.ndarray]:
        x, p = self.problem, self.params
        p.n, p.d, p.padded = x.n, x.z.shape[1], whole_blocks(x.n)
        p.columns, p.first, p.diagonal = x.columns or x.n, x.first, x.diagonal
        p.contrast, p.distill, p.weighted = x.clusters is not None, x.distill, x.weighted and x.gamma != 0
        p.gamma, p.inv_tau = x.gamma, 0 if x.device_temperature else 1 / x.temperature
        p.inv_teacher_tau = 1 / x.teacher_temperature if x.teacher_temperature else 0
        if x.device_temperature:
            self.put(temperature=np.array(x.temperature, np.float32))
        self.order = np.arange(x.n)
        if p.contrast:
            self._order()
        kind = "float32" if x.kind == "float16" and not x.normalize else x.kind
        half = kind == "float32" and x.splits is None
        rows, guide = (values[self.order] for values in x.rounded())
        z = prepare(self.dev, rows, kind, x.normalize, splits=x.splits, half=half)
        e = prepare(self.dev, guide, kind, True, splits=x.splits, half=half)
        p.z, p.e, p.v = z.operand, e.operand, z.operand
        if half:
            p.v = prepare(self.dev, rows, kind, x.normalize).operand
        elif z.operand.is_half:
            self.values = self.dev.put(bf16_bits(self.dev.get(z.data)))
            p.v = Operand(self.values.ptr, z.operand.scale, x.n, z.operand.k_tiles, 1, 0)
        p.inv_norm, p.normalize, p.grad_type = z.inv_norm.ptr, x.normalize, KINDS.index(x.kind)
        self._plan(backward=False)
        self._splits(backward=False)
        contrast, distill = ("loss", "kl") if not p.first else ("positive_logit", "excess")
        names = [*((contrast, "weight", "lse") if p.contrast else ()),
                 *((distill, "student_lse", "teacher_lse") if p.distill else ()),
                 *(("gap",) if p.distill and p.first else ())]  # fmt: skip
        return self._sums(*names)

    def _splits(self, backward: bool):
        x, p = self.problem, self.params
        p.k_splits = x.k_splits or self.dev.call(
            "ltood_guided_k_splits", x.n - p.first, p.columns, p.z.k_tiles, backward
        )

    def _sums(self, *names: str) -> dict[str, np.ndarray]:
        p = self.params
        self.fresh(sums=((p.k_splits, SUMS, p.padded - p.first), np.float32))
        self.fresh(**{name: (p.n - p.first, np.float32 if name in ("loss", "kl") else np.float64) for name in names})
        self.launch("forward")
        return {name: self.get(name) for name in names}

    def forward_every(self, every: np.ndarray) -> np.ndarray:
        """A partial problem's second pass: the log-sum-exps of the marked rows over all columns."""
        self.put(every=every.astype(np.uint8))
        self.params.distill, self.params.weight = 0, None
        self._plan(backward=False)
        return self._sums("lse")["lse"]

    def lse_bwd(self, contrast_state: np.ndarray) -> np.ndarray:
        """A partial problem's backward pass, of the contrastive part."""
        self.put(contrast_state=contrast_state, every=None)
        self._plan(backward=True)
        self._splits(backward=True)
        x, p = self.problem, self.params
        self.fresh(gradient=((p.k_splits, x.n - p.first, COLUMNS * p.z.k_tiles), np.float32),
                   grad_unit=((x.n - p.first, p.d), np.float32))  # fmt: skip
        self.launch("backward")
        return self.get("grad_unit")

    def backward(self, **gradients: np.ndarray) -> tuple[np.ndarray, float]:
        """(dL/dz, dL/dtemperature) for gradients of loss, lse, kl and student_lse."""
        x, p = self.problem, self.params
        self.put(**{name: gradients.get(name) for name in GRADIENTS})
        self._plan(backward=True)
        if p.contrast:
            entries = self.get("neighbor_at").ravel()
            reverse = np.argsort(entries, kind="stable")
            self.put(reverse_keys=entries[reverse], reverse_order=reverse)
        self._splits(backward=True)
        storage = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}[x.kind]
        self.fresh(gradient=((p.k_splits, x.n, COLUMNS * p.z.k_tiles), np.float32), grad_z=(x.z.shape, storage),
                   u_dot_du=(x.n, np.float32))  # fmt: skip
        self.launch("backward")
        grad_z = self.get("grad_z")
        if x.kind == "bfloat16":
            grad_z = (grad_z.astype(np.uint32) << 16).view(np.float32)
        return grad_z.astype(np.float64), -self.get("u_dot_du").astype(np.float64).sum() / (2 * x.temperature)
