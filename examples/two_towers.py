"""CLIP-style two towers: images and texts meet in one space, with a learned temperature.

    python examples/two_towers.py

The pairs are made up: a hidden vector shows itself once through an "image" and once through a "text", both with noise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltood_fast

PAIRS, TESTED, HIDDEN, IMAGE, TEXT, WIDTH, BATCH, EPOCHS = 2048, 256, 16, 96, 48, 32, 256, 8


def tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, WIDTH))


def make_pairs() -> tuple[Tensor, Tensor]:
    """(images [N, IMAGE], texts [N, TEXT]), row i of one belongs to row i of the other."""
    hidden = torch.randn(PAIRS + TESTED, HIDDEN)
    images, texts = (torch.tanh(hidden @ torch.randn(HIDDEN, width)) for width in (IMAGE, TEXT))
    return images + 0.3 * torch.randn_like(images), texts + 0.3 * torch.randn_like(texts)


def found(image: Tensor, text: Tensor) -> float:
    """Share of images whose nearest text is their own."""
    _, nearest = ltood_fast.knn(image, k=1, y=text)
    return (nearest[:, 0] == torch.arange(len(image))).float().mean().item()


def main() -> None:
    torch.manual_seed(0)
    images, texts = make_pairs()
    image_tower, text_tower = tower(IMAGE), tower(TEXT)
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    optimizer = torch.optim.AdamW([*image_tower.parameters(), *text_tower.parameters(), log_scale], lr=2e-3)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(PAIRS).split(BATCH):
            image, text = F.normalize(image_tower(images[rows])), F.normalize(text_tower(texts[rows]))
            loss = ltood_fast.clip_loss(image, text, log_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 2 == 1:
            with torch.no_grad():
                share = found(image_tower(images[PAIRS:]), text_tower(texts[PAIRS:]))
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, scale {log_scale.exp():.1f}, found {100 * share:.0f} %")


if __name__ == "__main__":
    main()
