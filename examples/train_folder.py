"""Long-tail training of a folder of images: SimCLR, stage 1 with OOD images, a report.

    python examples/train_folder.py [FOLDER]

Makes a folder as yours might be (`train` and `test`, one folder a class, and a pool of other images), here from
scikit-learn's digits and rendered letters, then trains on it with the command line.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from ltood_fast import cli
from ltood_fast.data.embedded import digits, letters

SIZE, LARGEST, RATIO = 16, 60, 0.7


def save(images, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images[0].numpy()).convert("RGB").save(folder / f"{name}.png")


def make_folders(root: Path) -> None:
    """photos/train and photos/test with a folder a class, long-tailed in train; pool without classes."""
    for part, limits in (("train", [int(LARGEST * RATIO**c) for c in range(10)]), ("test", [20] * 10)):
        data, seen = digits(SIZE, part), [0] * 10
        for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            if seen[label] < limits[label]:
                save(image, root / "photos" / part / f"digit{label}", f"{i:04d}")
                seen[label] += 1
    for i, image in enumerate(letters(SIZE, 200, 0).images):
        save(image, root / "pool", f"{i:04d}")


def main(root: Path) -> None:
    make_folders(root)
    options = {
        "data.root": root, "data.id": "folder:photos", "data.ood": "folder:pool", "data.imbalance": 0,
        "data.image_size": SIZE, "data.cache_dir": root / "cache", "augment.flip": 0, "stage1.budget": 60,
        "stages": "simclr,stage1", "run.progress": "false",
    }  # fmt: skip
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    code = cli.main(["train", "--config", "smoke", "--run-dir", str(root / "run"), *arguments])
    print("report:", "run/report.html" if code == 0 and (root / "run/report.html").exists() else "none")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
