"""Linear probe: multinomial logistic regression on frozen features, with hyperparameters selected from a grid.

There are two solvers:

- "sgd" is SGD with momentum and cosine schedule, as in the common linear probe, but without augmentation. The probes of
  all entries of the grid are trained simultaneously.
- "lbfgs" is L-BFGS along a regularization path (as in DINOv2, arXiv:2304.07193). It is deterministic and runs to
  convergence.

Yaml: conf/protocol/linear.yaml. Sizes: n images, d dimensions, C classes, G hyperparameter choices ("heads").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sslcli.engine.precision import DTYPES, resolve
from sslcli.evaluation.base import FeatureProtocol, OnProgress, ignore_progress, trained_and_measured
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.heads import Heads, SgdHeads, cross_entropy_gradient, score
from sslcli.evaluation.result import accuracy, best, bootstrap_interval, top5
from sslcli.evaluation.variants import suffix


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """Result of one probe. Accuracies are fractions. `interval` is the 95 % bootstrap interval of `top1`.

    `grid` has one entry per choice of hyperparameters, and `chosen` is the best entry. Every entry has the keys
    val_top1 and val_loss, the accuracy and the loss on held-out images. The other keys are the hyperparameters: lr and
    weight_decay with the solver "sgd", or c with "lbfgs".
    """

    top1: float
    top5: float
    interval: tuple[float, float]
    chosen: dict[str, float]
    grid: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear layer for raw (not standardized) features: weight (C, d) and bias (C,) for C classes and d dimensions.

    `chosen` contains the selected hyperparameters with which the layer was trained.
    """

    weight: Tensor
    bias: Tensor
    chosen: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Standardize:
    """Standardization of features to zero mean and unit standard deviation. `of` computes the statistics."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardize:
        """Return the standardization with mean and standard deviation of each column of `features` (n, d).

        Standard deviations are at least 1e-6.
        """
        return cls(mean=features.mean(dim=0), std=features.std(dim=0, correction=0).clamp_min(1e-6))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


@torch.no_grad()
def fit_sgd(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    on_progress: OnProgress = ignore_progress,
) -> Heads:
    """Train one head per pair (lrs[g], weight_decays[g]) on x (n, d) and y (n,). All heads use the same batches.

    The loss is softmax cross-entropy, and the optimizer is SGD with momentum (`SgdHeads`). A cosine schedule, updated
    at every step, decreases the learning rate to 0. The result is deterministic for a given seed. Matrix products are
    computed in the dtype of x, which may have 16 bits. Weights and their updates are accumulated in 32 bits.
    `on_progress(1)` is called after each epoch.
    """
    n, d = x.shape
    full = torch.promote_types(x.dtype, torch.float32)
    heads = SgdHeads(
        lrs=lrs,
        weight_decays=weight_decays,
        width=d,
        num_classes=num_classes,
        momentum=momentum,
        device=x.device,
        dtype=full,
    )
    generator = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(n / batch_size)
    step = 0
    for _ in range(epochs):
        for index in torch.split(torch.randperm(n, generator=generator).to(x.device), batch_size):
            scale = 0.5 * (1 + math.cos(math.pi * step / total))
            heads.step(x.index_select(0, index), y[index], scale=scale)
            step += 1
        on_progress(1)
    return heads.heads()


def fit_lbfgs(
    x: Tensor,
    y: Tensor,
    *,
    num_classes: int,
    cs: Sequence[float],
    max_iterations: int,
    on_progress: OnProgress = ignore_progress,
) -> Heads:
    """Minimize cross-entropy + |W|^2 / (2 c n) for each c of `cs` by L-BFGS, on x (n, d) and y (n,).

    c is the inverse regularization strength, called C in scikit-learn's LogisticRegression. The problems are solved
    from strong to weak regularization, and each solution initializes the next problem. The solver stops when all
    elements of the gradient are at most 1e-5 in absolute value, when an iteration changes the loss or the weights by
    less than 1e-9, or after `max_iterations`. `on_progress(1)` is called after each c.
    """
    n, d = x.shape
    theta = x.new_zeros(num_classes, d + 1, requires_grad=True)  # the last column is the bias
    theta.grad = torch.zeros_like(theta)
    found: dict[float, Tensor] = {}
    for c in sorted(cs):
        solver = torch.optim.LBFGS(
            [theta], max_iter=max_iterations, tolerance_grad=1e-5, tolerance_change=1e-9, line_search_fn="strong_wolfe"
        )

        def closure(c: float = c) -> Tensor:
            with torch.no_grad():
                weight = theta[:, :-1]
                logits = torch.addmm(theta[:, -1:], weight, x.T)
                penalty = weight.square().sum() / (2 * c * n)
                loss = F.cross_entropy(logits[None], y[None]) + penalty
                error = cross_entropy_gradient(logits, y, num_classes)
                assert theta.grad is not None
                theta.grad[:, :-1] = (error @ x).add_(weight, alpha=1 / (c * n))
                theta.grad[:, -1] = error.sum(dim=1)
            return loss

        solver.step(closure)  # type: ignore[no-untyped-call]
        found[c] = theta.detach().clone()
        on_progress(1)
    heads = torch.cat([found[c] for c in cs]).T
    return heads[:-1].contiguous(), heads[-1].contiguous()


@dataclass(frozen=True, kw_only=True)
class Linear(FeatureProtocol):
    """The linear protocol: select hyperparameters on a held-out part of train, then refit on all of train.

    The reported split is test if it exists, else val. It is used once, after the selection.

    Raises ValueError if a value is out of range.
    """

    title: ClassVar[str] = "linear probe"
    trains_on_val: ClassVar[bool] = True
    named: ClassVar[dict[str, Any]] = {"seed": 0}
    solver: str = "sgd"
    lrs: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    weight_decays: Sequence[float] = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
    epochs: int = 30
    batch_size: int = 1024
    momentum: float = 0.9
    cs: Sequence[float] = tuple(10.0**e for e in range(-6, 6))
    max_iterations: int = 100
    val_fraction: float = 0.1
    seed: int = 0
    resamples: int = 1000

    def __post_init__(self) -> None:
        if self.solver not in ("sgd", "lbfgs"):
            raise ValueError(f"solver={self.solver!r} is unknown: choose sgd or lbfgs")
        for name, low in (("lrs", "above 0"), ("cs", "above 0"), ("weight_decays", "at least 0")):
            values = getattr(self, name)
            if len(values) == 0 or not all(v > 0 or (v == 0 and low != "above 0") for v in values):
                raise ValueError(f"{name}={list(values)} must hold at least one number, all {low}")
        for name in ("epochs", "batch_size", "max_iterations", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be in [0, 1): 0.9 is usual")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be between 0 and 1: 0.1 is usual")

    def variant(self, monitor: Mapping[str, Any]) -> str:
        """Return a suffix with the seed, unless it is 0."""
        return suffix(self, self.named)

    def description(self, result: Mapping[str, Any]) -> str:
        """Return one line that states how the accuracy in `result` differs from published linear accuracies."""
        return (
            f"linear probe on cached features without augmentation, {trained_and_measured(result)}: the published "
            "protocol trains on random crops (protocol=linear_sgd), which can change the accuracy"
        )

    @property
    def progress_units(self) -> int:
        """Number of `on_progress(1)` calls in `fit`.

        `fit` trains twice: to select the hyperparameters, and then on all training images. With SGD, there is one call
        per epoch. With L-BFGS, there is one call per value of `cs` (inverse regularization strengths) in the selection,
        and one call in the final training.
        """
        return 2 * self.epochs if self.solver == "sgd" else len(self.cs) + 1

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        """Return a JSON-serializable result: accuracies as fractions, and the 95 % interval [low, high] of top1."""
        split, x_test, y_test = features.reported()
        num_classes, x, y = features.num_classes, features.train, features.train_labels
        found = self.fit(x, y, x_test, y_test, num_classes=num_classes, on_progress=on_progress)
        mine = ["lrs", "weight_decays", "epochs", "batch_size", "momentum"]
        if self.solver == "lbfgs":
            mine = ["cs", "max_iterations"]
        return {
            "protocol": "linear",
            "split": split,
            **asdict(found),
            "interval": list(found.interval),
            "n_train": len(features.train),
            "n_test": len(x_test),
            "num_classes": num_classes,
            "solver": self.solver,
            **{k: list(v) if isinstance(v := getattr(self, k), Sequence) else v for k in mine},
            "val_fraction": self.val_fraction,
            "seed": self.seed,
        }

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        x_test: Tensor,
        y_test: Tensor,
        *,
        num_classes: int,
        on_progress: OnProgress = ignore_progress,
    ) -> LinearResult:
        """Fit a probe to features x (n, d) and labels y (n,), and evaluate it on x_test (m, d) and y_test (m,)."""
        x, x_test = x.float(), x_test.float()
        grid, chosen = self.choose(x, y, num_classes=num_classes, on_progress=on_progress)
        scale = Standardize.of(x)
        heads = self._heads(scale(x), y, [chosen], num_classes=num_classes, on_progress=on_progress)
        place, _ = score(scale(x_test), y_test, heads, num_classes=num_classes)
        return LinearResult(
            top1=accuracy(place[0], 1),
            top5=top5(place[0], num_classes),
            interval=bootstrap_interval(place[0] == 0, seed=self.seed, resamples=self.resamples),
            chosen=chosen,
            grid=grid,
        )

    def choose(
        self, x: Tensor, y: Tensor, *, num_classes: int, on_progress: OnProgress = ignore_progress
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Return all tested choices of hyperparameters (the grid), and the best choice.

        Each choice contains its accuracy and loss on held-out images. For the keys, see `LinearResult`.
        """
        n = len(x)
        if n < 2:
            raise ValueError(f"the linear protocol needs at least 2 training images, got {n}: raise dataset.limit")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        num_held_out = min(n - 1, max(1, round(self.val_fraction * n)))
        held_out, kept = order[:num_held_out], order[num_held_out:]
        rows = x[kept]
        scale = Standardize.of(rows)
        rows = scale(rows)
        if self.solver == "sgd":  # on a GPU, the selection uses 16 bits; the reported probe uses 32 bits
            rows = rows.to(DTYPES[resolve("auto", rows.device)])
        heads = self._heads(rows, y[kept], self._choices(), num_classes=num_classes, on_progress=on_progress)
        place, loss = score(scale(x[held_out]), y[held_out], heads, num_classes=num_classes)
        grid = [
            {**choice, "val_top1": accuracy(p, 1), "val_loss": float(v)}
            for choice, p, v in zip(self._choices(), place, loss, strict=True)
        ]
        return grid, grid[best(grid)]

    def head(self, x: Tensor, y: Tensor, *, num_classes: int) -> Head:
        """Return a linear classifier, trained on features x (n, d) and labels y (n,).

        The classifier is trained on standardized features. The standardization is then merged into its weights and
        biases, so the classifier takes features that are not standardized.
        """
        x = x.float()
        _, chosen = self.choose(x, y, num_classes=num_classes)
        scale = Standardize.of(x)
        weight, bias = self._heads(scale(x), y, [chosen], num_classes=num_classes)
        weight = weight / scale.std[:, None]
        return Head(weight=weight.T, bias=bias - scale.mean @ weight, chosen=chosen)

    def _choices(self) -> list[dict[str, float]]:
        """Return the grid: a dict of hyperparameters for each head, in the order of the heads."""
        if self.solver == "lbfgs":
            return [{"c": float(c)} for c in self.cs]
        return [{"lr": float(lr), "weight_decay": float(wd)} for lr in self.lrs for wd in self.weight_decays]

    def _heads(
        self,
        x: Tensor,
        y: Tensor,
        choices: list[dict[str, float]],
        *,
        num_classes: int,
        on_progress: OnProgress = ignore_progress,
    ) -> Heads:
        if self.solver == "lbfgs":
            cs = [choice["c"] for choice in choices]
            return fit_lbfgs(
                x, y, num_classes=num_classes, cs=cs, max_iterations=self.max_iterations, on_progress=on_progress
            )
        return fit_sgd(
            x,
            y,
            num_classes=num_classes,
            lrs=[choice["lr"] for choice in choices],
            weight_decays=[choice["weight_decay"] for choice in choices],
            epochs=self.epochs,
            batch_size=self.batch_size,
            momentum=self.momentum,
            seed=self.seed,
            on_progress=on_progress,
        )
