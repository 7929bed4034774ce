"""Counts the machine code of the kernels and predicts their time: ``python -m benchmarks static-cost``."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import report, toolchain


def run(arguments: argparse.Namespace) -> int:
    if toolchain.nvcc() is None:
        raise ValueError("nvcc is needed: put it on PATH, or set CUDA_HOME to a CUDA toolkit")
    if toolchain.nvdisasm() is None:
        raise ValueError("nvdisasm is needed: pip install nvidia-cuda-nvdisasm, or set NVDISASM to the program")
    result = report.run()
    report.write(arguments.output, result)
    print(f"{report.markdown(result)}\nwritten to {arguments.output} and {arguments.output.with_suffix('.md')}")
    return 0


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "static-cost", help="count the kernels' machine code and predict their time: needs nvcc and nvdisasm, no GPU"
    )
    parser.set_defaults(function=run)
    parser.add_argument(
        "--output", type=Path, default=report.OUTPUT, help="the JSON; the table gets the same name with .md"
    )
