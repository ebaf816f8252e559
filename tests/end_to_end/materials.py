"""What a small federation needs beside programs: an artifact and images."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.fleet import CLASSES, SIDE, write_images

__all__ = ["make_artifact", "make_data"]


def make_data(folder: Path, count: int) -> list[Path]:
    """Images of several devices, and the server's as the last."""
    return [write_images(folder / f"images-{seed}.npz", seed) for seed in range(count)]


def make_artifact(folder: Path, name: str = "lenet", *, local_heads: bool = False) -> Path:
    """LeNet-5 for 16x16 images, pruned to a tenth."""
    from fedzo.exporter.artifact import export_artifact

    export_artifact("lenet5", (1, SIDE, SIDE), CLASSES, 0.9, 1, folder / name, local_heads=local_heads)
    return folder / name
