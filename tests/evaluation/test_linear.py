from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.heads import score
from sslcli.evaluation.linear import Linear, Standardize, fit_lbfgs, fit_sgd

SOLVERS = ["sgd", "lbfgs"]


def clusters(n: int, *, d: int = 10, c: int = 3, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    centers = torch.randn(c, d, generator=torch.Generator().manual_seed(99))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(c, (n,), generator=g)
    return centers[y] + spread * torch.randn(n, d, generator=g), y


def probe(solver: str, spread: float = 1.0, **keywords) -> tuple[Linear, tuple[Tensor, Tensor, Tensor, Tensor]]:
    return (
        Linear(solver=solver, batch_size=256, epochs=15, **keywords),
        (*clusters(1200, spread=spread, seed=1), *clusters(1000, spread=spread, seed=2)),
    )


@pytest.mark.parametrize("solver", SOLVERS)
def test_separable_clusters_are_told_apart(solver):
    linear, data = probe(solver, spread=0.2)
    assert linear.fit(*data, num_classes=3).top1 > 0.995


@pytest.mark.parametrize("solver", SOLVERS)
def test_equals_logistic_regression_of_scikit_learn(solver):
    linear, (x, y, x_test, y_test) = probe(solver, spread=1.6)
    found = linear.fit(x, y, x_test, y_test, num_classes=3)
    scale = Standardize.of(x)
    reference = LogisticRegression(C=1.0, max_iter=1000).fit(scale(x).numpy(), y.numpy())
    assert found.top1 == pytest.approx(reference.score(scale(x_test).numpy(), y_test.numpy()), abs=0.01)
    assert found.interval[0] < found.top1 < found.interval[1]


def test_lbfgs_finds_the_weights_of_scikit_learn_for_every_c():
    x, y = clusters(400, spread=1.6)
    cs = [10.0, 0.01, 1.0]
    weight, bias = fit_lbfgs(x, y, num_classes=3, cs=cs, max_iterations=200)
    for i, c in enumerate(cs):
        reference = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit(x.numpy(), y.numpy())
        want = torch.from_numpy(reference.coef_).T.float()
        torch.testing.assert_close(weight[:, 3 * i : 3 * i + 3], want, rtol=1e-2, atol=2e-3)
        mine, theirs = bias[3 * i : 3 * i + 3], torch.from_numpy(reference.intercept_).float()
        torch.testing.assert_close(mine - mine.mean(), theirs - theirs.mean(), rtol=1e-2, atol=2e-3)


def test_sgd_equals_torch_sgd_with_a_cosine_on_each_head():
    x, y = clusters(100)
    lrs, decays = [0.1, 1.0], [1e-2, 0.0]
    settings = {"num_classes": 3, "epochs": 4, "batch_size": 32, "momentum": 0.9, "seed": 5}
    weight, bias = fit_sgd(x, y, lrs=lrs, weight_decays=decays, **settings)
    for head, (lr, decay) in enumerate(zip(lrs, decays, strict=True)):
        layer = torch.nn.Linear(10, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}]
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
        generator, step = torch.Generator().manual_seed(5), 0
        for _ in range(4):
            for index in torch.randperm(100, generator=generator).split(32):
                for group in optimizer.param_groups:
                    group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / 16))
                optimizer.zero_grad()
                F.cross_entropy(layer(x[index]), y[index]).backward()
                optimizer.step()
                step += 1
        columns = slice(3 * head, 3 * head + 3)
        torch.testing.assert_close(weight[:, columns], layer.weight.detach().T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias[columns], layer.bias.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator(solver):
    linear, data = probe(solver, spread=2.0)
    torch.manual_seed(0)
    one = linear.fit(*data, num_classes=3)
    torch.manual_seed(1)
    assert linear.fit(*data, num_classes=3) == one


def test_another_seed_gives_another_split():
    one, data = probe("sgd", spread=2.0)
    two, _ = probe("sgd", spread=2.0, seed=1)
    assert one.fit(*data, num_classes=3).grid != two.fit(*data, num_classes=3).grid


@pytest.mark.parametrize("solver", SOLVERS)
def test_random_labels_give_chance(solver):
    linear, (x, y, x_test, y_test) = probe(solver)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    balanced = torch.arange(len(y_test)) % 3
    x_test = x_test[torch.randperm(len(x_test), generator=torch.Generator().manual_seed(1))]
    assert linear.fit(x, y, x_test, balanced, num_classes=3).top1 == pytest.approx(1 / 3, abs=0.06)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_choice_does_not_look_at_the_test_set(solver):
    linear, (x, y, x_test, y_test) = probe(solver, spread=2.0)
    one = linear.fit(x, y, x_test, y_test, num_classes=3)
    two = linear.fit(x, y, -5 * x_test[:50], (y_test[:50] + 1) % 3, num_classes=3)
    assert (one.grid, one.chosen) == (two.grid, two.chosen)
    assert one.top1 != two.top1


def test_a_head_that_diverges_leaves_the_others_as_they_are():
    x, y = clusters(300)
    settings = {"num_classes": 3, "epochs": 3, "batch_size": 64, "momentum": 0.9, "seed": 0}
    alone = fit_sgd(x, y, lrs=[0.1, 0.1], weight_decays=[0.0, 0.0], **settings)
    beside = fit_sgd(x, y, lrs=[0.1, 1e30], weight_decays=[0.0, 1e9], **settings)
    assert not torch.isfinite(beside[0][:, 3:]).all()
    assert torch.equal(alone[0][:, :3], beside[0][:, :3])
    place, loss = score(x, y, beside, num_classes=3)
    assert (place[1] == 3).all()
    assert loss[1] == torch.finfo(torch.float32).max


def test_a_head_that_diverges_is_not_chosen():
    x, y = clusters(300, spread=0.3)
    found = Linear(lrs=[0.1], weight_decays=[1e9, 0.0], epochs=30).fit(x, y, x, y, num_classes=3)
    assert found.grid[0]["val_top1"] == 0.0
    assert found.chosen == found.grid[1]
    assert found.top1 > 0.9


def test_scaling_and_shifting_features_hardly_matters():
    linear, (x, y, x_test, y_test) = probe("sgd", spread=1.6)
    factor = torch.logspace(-3, 3, 10)
    one = linear.fit(x, y, x_test, y_test, num_classes=3).top1
    two = linear.fit(x * factor + 7, y, x_test * factor + 7, y_test, num_classes=3).top1
    assert one == pytest.approx(two, abs=5e-3)


def test_a_dimension_that_never_varies_is_harmless():
    linear, (x, y, x_test, y_test) = probe("sgd", spread=0.2)
    x, x_test = x.clone(), x_test.clone()
    x[:, 0], x_test[:, 0] = 0.0, 100.0
    assert linear.fit(x, y, x_test, y_test, num_classes=3).top1 > 0.99


def test_protocol_reports_test_and_else_val_as_json():
    x, y = clusters(300, spread=0.3)
    features = FeatureSet(train=x[:200], train_labels=y[:200], val=x[200:], val_labels=y[200:], num_classes=3)
    result = json.loads(json.dumps(Linear(epochs=5).measure(features), allow_nan=False))
    assert (result["protocol"], result["split"], result["n_train"], result["n_test"]) == ("linear", "val", 200, 100)
    assert result["top1"] > 0.95
    assert len(result["grid"]) == 40
    test_set = FeatureSet(**vars(features) | {"test": x[:50], "test_labels": y[:50]})
    result = json.loads(json.dumps(Linear(solver="lbfgs", cs=[1.0]).measure(test_set), allow_nan=False))
    assert (result["split"], result["n_test"], result["chosen"]["c"]) == ("test", 50, 1.0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"solver": "adam"}, "choose sgd or lbfgs"),
        ({"lrs": []}, "at least one number"),
        ({"lrs": [0.1, 0.0]}, "all above 0"),
        ({"cs": [-1.0]}, "all above 0"),
        ({"weight_decays": [-1e-4]}, "all at least 0"),
        ({"weight_decays": [math.nan]}, "all at least 0"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_iterations": 0}, "max_iterations=0"),
        ({"resamples": 0}, "resamples=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"val_fraction": 0.0}, "val_fraction=0.0"),
    ],
)
def test_values_out_of_range_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        Linear(**keywords)


def test_a_single_training_image_is_refused():
    x, y = clusters(1)
    with pytest.raises(ValueError, match="at least 2 training images"):
        Linear().fit(x, y, x, y, num_classes=3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_fit_tells_of_as_many_passes_as_it_has(solver):
    linear, data = probe(solver)
    progress: list[int] = []
    silent = linear.fit(*data, num_classes=3)
    assert linear.fit(*data, num_classes=3, on_progress=progress.append) == silent
    assert sum(progress) == linear.progress_units
