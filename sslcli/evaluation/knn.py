"""Weighted k-nearest-neighbor classification of frozen features.

The method is from Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
arXiv:1805.01978, section 3.4. This implementation follows DINO, arXiv:2104.14294, appendix F.1. Yaml:
conf/protocol/knn.yaml. The bank is the set of labeled training images among which the neighbors of a query are found. n
is the size of the bank, m the number of queries, d the feature dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.data import rng
from sslcli.data.sources.base import Source
from sslcli.distributed import collectives, shared_work
from sslcli.evaluation.base import FeatureProtocol, OnProgress, ignore_progress
from sslcli.evaluation.features import FeatureSet, check_features
from sslcli.evaluation.result import accuracy, bootstrap_interval, label_rank, top5
from sslcli.evaluation.splits import whole_training_set
from sslcli.evaluation.variants import suffix


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """Result of a k-NN classification of m query images into C classes.

    Attributes:
        top1, top5: the accuracies, as fractions.
        predictions: (m,) int64, the predicted classes.
        votes: (m, C), the votes of the neighbors of each query for each class. The votes of a query sum to 1.
        correct: (m,) bool, True if the predicted class is the true class.
        place: (m,) int64, the ranks of the true classes. 0 is the best rank, C means that no neighbor has it.
    """

    top1: float
    top5: float
    predictions: Tensor
    votes: Tensor
    correct: Tensor
    place: Tensor


@torch.no_grad()
def knn(
    train: Tensor,
    train_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.07,
    num_classes: int,
    chunk: int = 1024,
) -> KnnResult:
    """Classify each row of `query` (m, d) by weighted votes of the k most similar rows of `train` (n, d).

    The weight of a vote is exp(cosine similarity / temperature).

    - The features are L2-normalized, in float32 or float64.
    - k is capped at n.
    - If several classes have equal votes, the class with the lowest index is ranked first.
    - If none of the k neighbors of a query has the class of the query, the query counts as wrong for top-1 and top-5.
      This is also true if fewer than five classes got votes.
    - At most chunk x n similarities are in memory.
    - The image of a query must not be among the images of `train`.

    Raises ValueError if a value is out of range.
    """
    _check(k=k, temperature=temperature, chunk=chunk)
    check_features(train, train_labels, num_classes=num_classes, width=train.shape[-1], name="train")
    check_features(query, query_labels, num_classes=num_classes, width=train.shape[-1], name="query")
    dtype = torch.float64 if train.dtype == torch.float64 else torch.float32
    bank = F.normalize(train.to(dtype), dim=1)
    queries = F.normalize(query.to(dtype), dim=1)
    parts = [
        _votes(rows, bank, train_labels, min(k, len(bank)), temperature, num_classes)
        for rows in torch.split(queries, chunk)
    ]
    votes, near = (torch.cat(part) for part in zip(*parts, strict=True))
    place = label_rank(votes.masked_fill(~near, -1.0), query_labels)
    place[~near.gather(1, query_labels[:, None]).squeeze(1)] = num_classes
    return KnnResult(
        top1=accuracy(place, 1),
        top5=top5(place, num_classes),
        predictions=votes.argmax(dim=1),
        votes=votes,
        correct=place == 0,
        place=place,
    )


def _votes(
    rows: Tensor, bank: Tensor, labels: Tensor, k: int, temperature: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return the class votes (b, C) of b queries, and a mask (b, C) of the classes to which their neighbors belong.

    C is `num_classes`. The votes of a query sum to 1. `rows` (b, d) are the features of the queries, and `bank` (n, d)
    are the features of the training images. Both are L2-normalized.
    """
    similarity, neighbor = (rows @ bank.T).topk(k, dim=1)
    # softmax avoids overflow: exp(1 / temperature) exceeds the range of float32 for temperatures below 0.0113
    weight = (similarity / temperature).softmax(dim=1)
    # A vote may underflow to 0, so `votes > 0` would miss some classes that have neighbors.
    near = torch.zeros(len(rows), num_classes, dtype=torch.bool, device=rows.device)
    near.scatter_(1, labels[neighbor], True)
    votes = weight.new_zeros(len(rows), num_classes)
    return votes.scatter_add_(1, labels[neighbor], weight), near


def _check(*, k: int, temperature: float, chunk: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: 20 and 200 are usual")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0: 0.07 and 0.1 are usual")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1: 1024 is usual")


def bank_positions(source: Source, limit: int | None) -> Tensor:
    """Return the positions of the images among which neighbors are searched (the bank).

    These are the training images that are not in the splits "val" and "test". If there are more than `limit` such
    images, a random selection of `limit` of them is returned. Calls with equal arguments make the same selection.
    """
    positions = source.without_labels_of("val", "test")
    if limit is None or limit >= len(positions):
        return positions
    chosen = rng.permutation(len(positions), 0)[:limit].sort().values
    return positions[chosen]


def query_positions(source: Source, split: str, limit: int | None) -> Tensor:
    """Return the positions of the images of `split` that the k-NN monitor classifies (the queries), in their order.

    If there are more than `limit` labeled images, `limit` of them are selected. Each class keeps its fraction of the
    images, so the accuracy on the selection estimates the accuracy on the split. The selection depends only on the
    positions and labels of the images, and a smaller selection is part of a larger one.
    """
    positions = source.splits[split]
    labeled = positions[source.labels[positions] >= 0]
    if limit is None or limit >= len(labeled):
        return positions
    order = rng.mix(0, labeled).argsort()
    order = order[source.labels[labeled[order]].argsort(stable=True)]  # by class, in each class in the order of a hash
    counts = torch.bincount(source.labels[labeled])
    counts = counts[counts > 0]
    within = torch.cat([(torch.arange(int(count)) + 0.5) / count for count in counts.double()])
    chosen = order[within.argsort(stable=True)[:limit]]
    return labeled[chosen.sort().values]


@dataclass(frozen=True, kw_only=True)
class Knn(FeatureProtocol):
    """The k-NN protocol. Images of val and test are classified by their nearest neighbors in train.

    The images of val and test are the queries. The bank consists of images of train that are not in val.

    In the result, `top1` is the accuracy on val, which the monitor also measures during training. It may be used to
    select hyperparameters. `test_top1` is the accuracy to report, and must not be used for any selection. If the
    dataset has only one of the two splits, `top1` is the accuracy on this split, and there is no `test_top1`.
    """

    name: ClassVar[str] = "knn"
    shares_work: ClassVar[bool] = True

    k: int | None = None  # None: the value of the run's monitor, or 200 without a run
    temperature: float | None = None  # None: the value of the run's monitor, or 0.07 without a run
    chunk: int = 1024
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        _check(k=self.num_neighbors, temperature=self.softmax_temperature, chunk=self.chunk)
        if self.resamples < 1:
            raise ValueError(f"resamples={self.resamples} must be at least 1: 1000 is usual")

    @property
    def num_neighbors(self) -> int:
        """Number of neighbors k, 200 by default."""
        return 200 if self.k is None else self.k

    @property
    def softmax_temperature(self) -> float:
        """Temperature of the votes, 0.07 by default."""
        return 0.07 if self.temperature is None else self.temperature

    @classmethod
    def defaults(cls, monitor: Mapping[str, Any]) -> dict[str, Any]:
        """Return k and temperature from the settings of the run's monitor."""
        return {"k": monitor.get("knn_k"), "temperature": monitor.get("knn_temperature")}

    def training_positions(self, source: Source, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions of the bank images in `source`.

        The bank is the set of images among which neighbors are searched. It consists of the same training images as
        the bank of the run's monitor.
        """
        return bank_positions(source, monitor.get("knn_images"))

    def query_positions(self, source: Source, split: str, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions of the queries in `split`. The monitor's split has the same queries as the monitor."""
        is_monitored = split == monitor.get("knn_split", "val")
        return query_positions(source, split, monitor.get("knn_queries") if is_monitored else None)

    def reported_splits(self, splits: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of the query splits that exist: val, test or both."""
        return tuple(name for name in ("val", "test") if name in splits) or ("val",)

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name, with k and temperature.

        k is omitted if it equals the run's setting `monitor.knn_k`. The temperature is omitted if it equals the run's
        setting `monitor.knn_temperature`.
        """
        parts = []
        if self.num_neighbors != monitor.get("knn_k", 200):
            parts.append(f"k-{self.num_neighbors}")
        if self.softmax_temperature != monitor.get("knn_temperature", 0.07):
            parts.append(f"temperature-{self.softmax_temperature:.10g}")
        return "_".join(parts)

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that states how the accuracy in `result` differs from published k-NN accuracies."""
        return (
            f"{self.measured(result)}: comparable with the k-NN accuracy during training; publications use the whole "
            "training set as the bank and test images as queries (protocol=knn_full)"
        )

    def measured(self, result: Mapping[str, Any]) -> str:
        """Return one line with k, the temperature, and the numbers of training images and of evaluated images."""
        return (
            f"k-NN (k {result['k']}, temperature {result['temperature']:g}) with a bank of {result['n_train']:,} "
            f"training images, measured on {result['n_test']:,} images of {result['split']}"
        )

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return a JSON-serializable result. Accuracies are fractions, and intervals are [low, high] at 95 %."""
        split, queries, labels = features.reported()
        if features.val is not None and features.val_labels is not None:
            split, queries, labels = "val", features.val, features.val_labels
        top1, best5, interval = self._classify(features, queries, labels)
        result: dict[str, Any] = {
            "protocol": self.name,
            "split": split,
            "top1": top1,
            "top5": best5,
            "interval": interval,
            "n_train": len(features.train),
            "n_test": len(queries),
            "num_classes": features.num_classes,
            "k": min(self.num_neighbors, len(features.train)),
            "temperature": self.softmax_temperature,
            "seed": self.seed,
        }
        test, labels_of_test = features.test, features.test_labels
        if split == "val" and test is not None and labels_of_test is not None and test is not queries:
            top1, best5, interval = self._classify(features, test, labels_of_test)
            result |= {"test_top1": top1, "test_top5": best5, "test_interval": interval}
        return result

    def _classify(self, features: FeatureSet, queries: Tensor, labels: Tensor) -> tuple[float, float, list[float]]:
        """Return the top-1 accuracy, the top-5 accuracy, and the 95 % interval of the top-1 accuracy.

        Each process classifies a part of the queries. All processes return the accuracies of all queries.
        """
        parts = shared_work.parts(len(queries), chunk=self.chunk)
        mine = parts[collectives.rank()]

        def ranks() -> Tensor:
            if len(mine) == 0:
                return labels[:0]
            return knn(
                features.train,
                features.train_labels,
                queries[mine.start : mine.stop],
                labels[mine.start : mine.stop],
                k=self.num_neighbors,
                temperature=self.softmax_temperature,
                num_classes=features.num_classes,
                chunk=self.chunk,
            ).place

        place = shared_work.gather_parts(shared_work.agreed(ranks), [len(part) for part in parts])
        interval = bootstrap_interval(place == 0, seed=self.seed, resamples=self.resamples)
        return accuracy(place, 1), top5(place, features.num_classes), list(interval)


@dataclass(frozen=True, kw_only=True)
class KnnFull(Knn):
    """The protocol `knn_full`: k-NN as in publications, with neighbors from the whole training set.

    The training set is the bank, and the images of test are the queries. If there is no test split, the queries are the
    images of val, and the bank is the rest of the training set.
    """

    name: ClassVar[str] = "knn_full"
    shares_work: ClassVar[bool] = True
    trains_on_val: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {"k": 200, "temperature": 0.1}

    k: int | None = 200
    temperature: float | None = 0.1

    @classmethod
    def defaults(cls, monitor: Mapping[str, Any]) -> dict[str, Any]:
        """Return the default values of k (200) and temperature (0.1).

        In contrast to `Knn`, these values do not depend on the settings `monitor` of the run.
        """
        return dict(cls.named)

    def training_positions(self, source: Source, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions of the images of "train" and "val". If "val" is reported, leave out its images."""
        return whole_training_set(source, self.reported_splits(source.nonempty_splits()))

    def query_positions(self, source: Source, split: str, monitor: Mapping[str, Any]) -> Tensor:
        """Return the positions of all images of `split`."""
        return FeatureProtocol.query_positions(self, source, split, monitor)

    def reported_splits(self, splits: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the name of the split with the queries: test, or val if there is no test split."""
        return FeatureProtocol.reported_splits(self, splits)

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix for the result's name, with k unless it is 200, and the temperature unless it is 0.1."""
        return suffix(self, self.named)

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that names the published accuracies to which the accuracy in `result` can be compared."""
        return (
            f"{self.measured(result)}: comparable with published k-NN accuracies of the same k, temperature and "
            "feature layer" + ("" if result["split"] == "test" else ", except that these are measured on test images")
        )

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return the result of the reported split: test, or val if there is no test split.

        `Knn` evaluates both splits. Here, val is not evaluated if there is a test split, because the images of val may
        then be in the bank, the labeled images among which neighbors are searched.
        """
        if features.test is not None:
            features = replace(features, val=None, val_labels=None, val_positions=None)
        return super().measure(features, on_progress=on_progress)
