"""The one table of tolerances: ||a - ref|| / ||ref|| against the float64 reference fed the same (rounded) inputs."""

import torch

LOSS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||; the plain norm of the difference where the expected value is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale or 1.0)


def assert_loss_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = relative_error(actual, expected)
    assert error <= LOSS[dtype], f"loss off by {error:.2e}, allowed {LOSS[dtype]:.0e}"


def assert_gradient_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = relative_error(actual, expected)
    assert error <= GRADIENT[dtype], f"gradient off by {error:.2e}, allowed {GRADIENT[dtype]:.0e}"
