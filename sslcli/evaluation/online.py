"""k-NN evaluation during training. `ssl-eval protocol=knn` uses the same code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sslcli.config.settings import MonitorSettings
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.engine import fsdp
from sslcli.evaluation.features import FeatureSet, computed, extract
from sslcli.evaluation.knn import Knn, bank_positions, query_positions
from sslcli.evaluation.splits import check_readable
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating, statistics_of_main

BATCH = 512  # images per forward pass, also in ssl-eval: kernels may round differently for other batch sizes


def collect(
    encode: Callable[[Tensor], Tensor],
    source: Source,
    splits: dict[str, Tensor],
    *,
    prepare: Callable[[Tensor], Tensor],
    batch_size: int,
    device: torch.device,
    precision: str,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    is_sharded: bool = False,
) -> FeatureSet:
    """Return features and labels of the given splits. Images that are unreadable or unlabeled are left out.

    The processes share the work, see `extract`. All of them return all features.
    """
    found: dict[str, Tensor] = {}
    for name, positions in splits.items():
        labeled = positions[source.labels[positions] >= 0]
        report = None if progress is None else partial(progress, name)
        features, readable = extract(
            encode,
            source,
            labeled,
            prepare=prepare,
            batch_size=batch_size,
            device=device,
            precision=precision,
            workers=workers,
            progress=report,
            is_sharded=is_sharded,
        )
        if not readable.any():
            check_readable(source, labeled, name)
        found[name] = features[readable]
        found[f"{name}_labels"] = source.labels[labeled][readable]
        found[f"{name}_positions"] = labeled[readable]
    return FeatureSet(**found, num_classes=len(source.classes), classes=tuple(source.classes))


def knn_probe(
    method: Method, source: Source, views: Views, monitor: MonitorSettings, *, device: torch.device, precision: str
) -> Callable[[], dict[str, float]]:
    """Return a function that measures the k-NN top-1 and top-5 accuracy of `method`, as fractions.

    All processes must call the function, and they share its work. The queries are the images of the split
    `monitor.knn_split`, at most `monitor.knn_queries` of them. The names of accuracies on "test" start with "test_",
    because these accuracies must not be used to select a run.
    """
    protocol = Knn(k=monitor.knn_k, temperature=monitor.knn_temperature)
    splits = {
        "train": bank_positions(source, monitor.knn_images),
        "val": query_positions(source, monitor.knn_split, monitor.knn_queries),
    }
    prefix = "" if monitor.knn_split == "val" else "test_"

    def probe() -> dict[str, float]:
        with evaluating(method), statistics_of_main(method), fsdp.gathered(method):
            features = collect(
                method.features,
                source,
                splits,
                prepare=lambda images: views.finish(images, mean=source.mean, std=source.std),
                batch_size=BATCH,
                device=device,
                precision=precision,
                is_sharded=fsdp.is_sharded(method),
            )
        result = computed(protocol.measure, features, device)
        return {f"{prefix}knn_top1": result["top1"], f"{prefix}knn_top5": result["top5"]}

    return probe
