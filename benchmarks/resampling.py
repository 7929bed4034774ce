"""One OOD re-sampling, exact and through FAISS's inverted file, at the sizes of the benchmark."""

from __future__ import annotations

import ltood_fast
from ltood_fast.experiments.exact_vs_ivf import Setup, by_ivf, exact, make_data, row

from . import harness

QUICK = Setup(id_rows=2_000, candidates=20_000, D=128, K=20, budget=1_000, lists=256, probes=(32,))
FULL = Setup(id_rows=12_406, candidates=300_000, D=512, K=100, budget=10_000, lists=1024, probes=(1, 8, 64))


def run(quick: bool) -> dict:
    """Rows of time, memory and recall, on the CPU. A single round: it takes seconds, not milliseconds."""
    setup = QUICK if quick else FULL
    data = make_data(setup)
    ltood_fast.cluster_tailness(data.rows[:1000], data.assignments[:1000], setup.K)  # thread pools
    first, truth = row("exact", lambda spent: exact(data, setup, spent), None, setup.budget)
    rows = [first]
    for probes in setup.probes:
        name = f"IVF, {probes} of {setup.lists} lists"
        try:
            rows.append(row(name, lambda spent, p=probes: by_ivf(data, setup, p, spent), truth, setup.budget)[0])
        except ImportError as failure:
            rows.append({"method": name, "status": harness.MISSING, "message": harness.message_of(failure)})
    return {"setup": vars(setup), "rows": rows}
