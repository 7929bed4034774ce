"""Replace lightly's NTXentLoss: one line of the training step changes, the loss and its gradient do not.

    python examples/replace_lightly.py

lightly takes the two views as two tensors, ltood_fast as one: rows i and i + B are the views of image i. Where lightly
is not installed, its loss is computed by the same formula in plain PyTorch.
"""

import torch
import torch.nn.functional as F

import ltood_fast

TEMPERATURE = 0.5


def lightly_loss(view0: torch.Tensor, view1: torch.Tensor) -> torch.Tensor:
    try:
        from lightly.loss import NTXentLoss
    except ImportError:
        u = F.normalize(torch.cat([view0, view1]), dim=1)
        s = (u @ u.T / TEMPERATURE).fill_diagonal_(-torch.inf)
        return F.cross_entropy(s, torch.arange(len(u)).roll(len(view0)))
    return NTXentLoss(temperature=TEMPERATURE)(view0, view1)


def main() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    images = torch.randn(256, 64)
    for step in range(20):
        view0, view1 = (network(images + 0.3 * torch.randn_like(images)) for _ in range(2))
        before = lightly_loss(view0, view1)
        loss = ltood_fast.nt_xent(torch.cat([view0, view1]), TEMPERATURE)  # the line that changes

        gradients = [torch.autograd.grad(l, list(network.parameters()), retain_graph=True) for l in (before, loss)]
        difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
        assert difference < 1e-6, difference

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 5 == 4:
            print(f"step {step + 1:2d}: before {before.item():.4f}, after {loss.item():.4f}")


if __name__ == "__main__":
    main()
