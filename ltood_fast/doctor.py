"""`ltood doctor`: what was built, what this machine offers, whether a kernel computes as it should, and what to do."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

# module -> (package to install, extra, what needs it)
EXTRAS = {
    "torchvision": ("torchvision", "train", "ResNets, CIFAR"),
    "lightning_fabric": ("lightning-fabric", "train", "ltood train"),
    "kornia": ("kornia", "train", "augmentation"),
    "faiss": ("faiss-cpu", "train", "k-means, IVF search"),
    "sklearn": ("scikit-learn", "train", "the embedded digits, probes, t-SNE"),
    "matplotlib": ("matplotlib", "train", "pictures of the report"),
    "jinja2": ("jinja2", "train", "report page, model card"),
    "tensorboard": ("tensorboard", "train", "run.loggers tensorboard"),
    "yaml": ("pyyaml", "train", "configurations"),
    "tqdm": ("tqdm", "train", "progress bars"),
    "pytorch_lightning": ("pytorch-lightning", "loggers", "run.loggers wandb, mlflow"),
    "wandb": ("wandb", "loggers", "run.loggers wandb"),
    "mlflow": ("mlflow", "loggers", "run.loggers mlflow"),
    "timm": ("timm", "models", "model.encoder timm:NAME"),
    "safetensors": ("safetensors", "export", "ltood export --format safetensors"),
    "onnx": ("onnx", "export", "ltood export --format onnx"),
    "onnxscript": ("onnxscript", "export", "ltood export --format onnx"),
    "onnxruntime": ("onnxruntime", "export", "ltood export --format onnx"),
}
TOLERANCE = 1e-4  # of the gradient in float32, the one that the tests use


@dataclass(frozen=True)
class Examination:
    """The findings, line by line, and advice."""

    lines: list[str]
    advice: list[str]
    healthy: bool
    """Whether every kernel that was tried agrees with its reference."""

    def __str__(self) -> str:
        todo = [f"  - {line}" for line in self.advice] or ["  nothing"]
        return "\n".join([*self.lines, "", "to do:", *todo])


def examine() -> Examination:
    import torch

    from . import build_info

    info = build_info()
    advice: list[str] = []
    lines = [f"ltood_fast {info['version']}, built for torch {info['torch']}, runs on torch {info['torch_running']}"]
    lines.append(f"CPU        {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
                 f"{torch.backends.cpu.get_cpu_capability()}")  # fmt: skip
    lines.append(f"CUDA       {_cuda(info, advice)}")
    lines += ["", "extras"]
    lines += [_extra(module, advice) for module in EXTRAS]
    lines += ["", "self-check (NT-Xent, forward and backward, against its reference)"]
    devices = ["cpu"] + (["cuda"] if info["cuda"] and torch.cuda.is_available() else [])
    errors = {device: kernel_error(device) for device in devices}
    for device, error in errors.items():
        lines.append(f"  {device:5} {'ok' if error <= TOLERANCE else 'WRONG'}, largest relative error {error:.1e}")
        if not error <= TOLERANCE:
            advice.append(f"The {device} kernel is wrong here: use backend='reference', and report this page.")
    return Examination(lines, advice, all(error <= TOLERANCE for error in errors.values()))


def _cuda(info: dict, advice: list[str]) -> str:
    """One line on kernels and devices; adds what to do where one is there without the other."""
    devices = ", ".join(info["cuda_devices"])
    if info["cuda"]:
        if not devices:
            advice.append("The CUDA kernels were built, but torch finds no device: look at nvidia-smi and the driver.")
        return f"kernels for {info['cuda_archs']}; devices: {devices or 'none'}"
    if devices:
        advice.append(
            f"The CUDA kernels were left out ({info['cuda_reason']}), and {devices} would use them: build again with "
            "LTOOD_CUDA=1 and nvcc on PATH."
        )
    return f"no kernels ({info['cuda_reason']}); devices: {devices or 'none'}"


def _extra(module: str, advice: list[str]) -> str:
    """One line on an optional package."""
    package, extra, serves = EXTRAS[module]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            advice.append(f"{package} is there but lacks {error.name}: pip install {error.name}.")
            return f"  {package:17} broken ({error}); {serves}"
        if extra == "train":
            advice.append(f"{package} is missing ({serves}): pip install {package}.")
        return f"  {package:17} missing [{extra}]; {serves}"
    except Exception as error:  # a build for another torch, a missing library: whatever comes
        reason = " ".join(str(error).split())[:120]
        advice.append(f"{package} cannot be imported ({reason}): install the build of it that fits this torch.")
        return f"  {package:17} broken ({reason}); {serves}"
    return f"  {package:17} {getattr(found, '__version__', 'there')}; {serves}"


def kernel_error(device: str) -> float:
    """The largest relative error of loss and gradient of the kernel against the reference, on 64 random rows."""
    import torch

    import ltood_fast

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 48, generator=generator).to(device)

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        z = rows.clone().requires_grad_()
        loss = ltood_fast.nt_xent(z, 0.2, backend=backend)
        loss.backward()
        return loss.detach(), z.grad

    pairs = zip(run("auto"), run("reference"), strict=True)
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)
