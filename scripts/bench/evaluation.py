"""Evaluation: k-NN of 10,000 images against 50,000, and a linear evaluation as a multiple of one forward pass."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from measure import Result, answer, timed
from torch import Tensor

BANK, QUERIES, DIM, CLASSES = 50_000, 10_000, 512, 10
IMAGES, TEST = 5_000, 1_000  # of the linear evaluation, a tenth of CIFAR-10


def clusters(count: int) -> tuple[Tensor, Tensor]:
    """Features around one centre a class; what is measured is time."""
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 2 * torch.randn(count, DIM), labels


def ours_knn() -> Result:
    from sslcli.evaluate.knn import knn

    (bank, classes), (queries, truth) = clusters(BANK), clusters(QUERIES)
    return timed(
        lambda: knn(bank, classes, queries, truth, k=200, temperature=0.1, num_classes=CLASSES),
        images=QUERIES,
        warmup=1,
    )


def lightly_knn() -> Result:
    from lightly.utils.benchmarking import knn_predict

    (bank, classes), (queries, _) = clusters(BANK), clusters(QUERIES)
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    return timed(
        lambda: [knn_predict(rows, bank.T, classes, CLASSES, 200, 0.1) for rows in torch.split(queries, 512)],
        images=QUERIES,
        warmup=1,
    )


def linear() -> Result:
    """Seconds of feature extraction and probe together, over those of a bare bfloat16 forward pass."""
    from sslcli.allocator import keep_freed_memory
    from sslcli.backbones.resnet import ResNet
    from sslcli.data.sources import Shapes
    from sslcli.data.views import Views
    from sslcli.evaluate.features import FeatureSet, extract
    from sslcli.evaluate.linear import Linear

    keep_freed_memory()
    source = Shapes(image_size=32, train_images=IMAGES, test_images=TEST, val_fraction=0.0)
    views = Views([{"count": 1}])
    net = ResNet("resnet18", image_size=32).to(memory_format=torch.channels_last).eval()
    assert source.images is not None
    whole = source.images

    def forward() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for images in torch.split(whole, 512):
                net((images.float() / 255).contiguous(memory_format=torch.channels_last))

    def features(split: str) -> tuple[Tensor, Tensor]:
        positions = source.splits[split]
        found, _ = extract(
            net,
            source,
            positions,
            prepare=lambda images: views.finish(images, mean=source.mean, std=source.std),
            batch_size=512,
            device="cpu",
            precision="bf16",
        )
        return found, source.labels[positions]

    def evaluate() -> None:
        (train, train_labels), (test, test_labels) = features("train"), features("test")
        Linear()(
            FeatureSet(
                train=train,
                train_labels=train_labels,
                test=test,
                test_labels=test_labels,
                num_classes=len(source.classes),
            )
        )

    seconds = {name: elapsed(work) for name, work in {"warm": forward, "forward": forward, "all": evaluate}.items()}
    return {"images_per_s": len(whole) / seconds["all"], "multiple": seconds["all"] / seconds["forward"]}


def elapsed(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


if __name__ == "__main__":
    answer({"knn/sslcli": ours_knn, "knn/lightly": lightly_knn, "linear/sslcli": linear})
