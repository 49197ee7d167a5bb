from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.distributed import collectives
from sslcli.evaluation.knn import knn
from sslcli.methods.bank import EPS, Bank, log_normalizer, nce, own_row_wins, scores, write
from sslcli.methods.base import Batch
from sslcli.methods.memory_bank import MemoryBank
from tiny import TinyNet, make_batch

N = 20  # images of the training set


def tiny_bank(*, norm: bool = True, **changes: object) -> MemoryBank:
    settings = {"num_images": N, "dim": 4, "loss": "nce", "negatives": 6, "temperature": 0.2} | changes
    return MemoryBank(TinyNet(norm=norm), **settings)


def batch_of(index: list[int], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    batch = make_batch(len(index), views=1, seed=seed, dtype=dtype)
    return Batch(batch.views, torch.tensor(index), batch.label)


def step(method: MemoryBank, batch: Batch) -> Tensor:
    """The loss of a step that changes the bank alone; the embeddings are in `method.embeddings`."""
    loss = method(batch)["loss"]
    method.after_step(0.0)
    return loss.detach()


def units(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


@golden_cases("instdisc_nce")
def test_nce_and_its_bank_equal_the_official_code_after_every_batch(case: Case) -> None:
    x, params = case.inputs, case.params
    num_images, temperature, rows = params["n_data"], params["temperature"], x["memory0"]
    log_z = None
    probabilities, losses, gradients, banks, normalizers = [], [], [], [], []
    for v, y, chosen in zip(x["x"], x["y"], x["idx"], strict=True):
        v = v.clone().requires_grad_()
        logits = scores(v, rows, chosen, temperature=temperature)
        if log_z is None:
            log_z = log_normalizer(logits, num_images)
        loss = nce(logits, log_z=log_z, num_images=num_images).mean()
        loss.backward()
        write(rows, y, v.detach(), momentum=params["momentum"])
        probabilities.append((logits - log_z).exp())
        losses.append(loss)
        gradients.append(v.grad)
        banks.append(rows.clone())
        normalizers.append(torch.tensor(math.exp(log_z), dtype=torch.float64))
    case.check(probabilities, "prob")
    case.check(losses, "loss")
    case.check(gradients, "grad_x")
    case.check(banks, "memory")
    case.check(normalizers, "Z")


@golden_cases("instdisc_softmax")
def test_full_softmax_and_its_bank_equal_the_official_code(case: Case) -> None:
    x, params = case.inputs, case.params
    num_images, dim = x["memory0"].shape
    settings = {name: params[name] for name in ("momentum", "temperature")}
    method = tiny_bank(num_images=num_images, dim=dim, loss="full", **settings).to(case.dtype)
    method.bank.rows.copy_(x["memory0"])
    every = torch.arange(num_images).expand(len(x["x"]), -1)
    case.check(scores(x["x"], method.bank.rows, every, temperature=params["temperature"]), "logits")
    v = x["x"].requires_grad_()
    loss = method.contrast(v, x["y"])["loss"]
    loss.backward()
    case.check(loss, "loss")
    case.check(v.grad, "grad_x")
    method.bank.remember(x["y"], v.detach())
    method.after_step(0.0)
    case.check(method.bank.rows, "memory")


def test_full_softmax_is_the_cross_entropy_over_the_bank_with_its_known_gradient() -> None:
    method = tiny_bank(loss="full", temperature=0.1).double()
    rows, v, index = method.bank.rows, units(5, 4).requires_grad_(), torch.tensor([3, 19, 0, 3, 7])
    scalars = method.contrast(v, index)
    (gradient,) = torch.autograd.grad(scalars["loss"], v)
    logits = v.detach() @ rows.T / 0.1
    torch.testing.assert_close(scalars["loss"], F.cross_entropy(logits, index))
    torch.testing.assert_close(gradient, (logits.softmax(1) - F.one_hot(index, N)) @ rows / 0.1 / 5)
    torch.testing.assert_close(scalars["accuracy"], (logits.argmax(1) == index).double().mean())


def nce_by_loops(v: Tensor, rows: Tensor, chosen: Tensor, *, z: float, temperature: float) -> Tensor:
    """The formulas of the paper (eq. 4 to 7) and the official code, one row after the other."""
    num_images, negatives = len(rows), chosen.shape[1] - 1
    total = torch.zeros((), dtype=v.dtype)
    for i in range(len(v)):
        for k in range(negatives + 1):
            p = torch.exp(v[i] @ rows[chosen[i, k]] / temperature) / z
            noise = negatives / num_images
            h = p / (p + noise + EPS)
            total = total - torch.log(h if k == 0 else noise / (p + noise + EPS))
    return total / len(v)


def test_nce_is_the_sum_over_rows_and_the_mean_over_images_with_duplicates() -> None:
    v, rows = units(3, 4), units(7, 4, seed=1)
    chosen = torch.tensor([[2, 5, 5, 2, 0, 6], [2, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    v.requires_grad_()
    logits = scores(v, rows, chosen, temperature=0.3)
    loss = nce(logits, log_z=math.log(11.0), num_images=7).mean()
    expected = nce_by_loops(v, rows, chosen, z=11.0, temperature=0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, v), torch.autograd.grad(expected, v))


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_negatives_are_drawn_from_all_images_anew_in_every_step(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(query: Tensor, rows: Tensor, chosen: Tensor, *, temperature: float) -> Tensor:
        seen.append(chosen)
        return scores(query, rows, chosen, temperature=temperature)

    monkeypatch.setattr("sslcli.methods.memory_bank.scores", spy)
    method, batch = tiny_bank(loss=loss, negatives=200), batch_of([3, 1, 0, 19])
    first, second = step(method, batch), step(method, batch)
    assert first.isfinite()
    assert second.isfinite()
    for chosen in seen:
        assert chosen.shape == (4, 201)
        assert torch.equal(chosen[:, 0], batch.index)
        assert all(set(row.tolist()) == set(range(N)) for row in chosen[:, 1:])  # the own one is not excluded
    assert not torch.equal(*seen)
    assert not torch.equal(seen[0][0, 1:], seen[0][1, 1:])


def test_normalizer_is_that_of_the_first_batch_and_is_kept() -> None:
    method = tiny_bank(norm=False).double()
    rows = method.bank.rows.clone()
    twin = tiny_bank(norm=False).double()
    twin.load_state_dict(method.state_dict())
    assert twin.log_z is None
    step(method, batch_of([3, 1, 0, 19], dtype=torch.float64))
    chosen = torch.cat([torch.tensor([[3], [1], [0], [19]]), twin.noise.integers(N, 4, 6, device=rows.device)], 1)
    products = torch.einsum("nd,nkd->nk", method.embeddings[0], rows[chosen])
    z = float((products / 0.2).exp().mean() * N)
    assert math.exp(method.log_z or 0.0) == pytest.approx(z)
    found = method.log_z
    step(method, batch_of([2, 4, 5, 6], seed=1, dtype=torch.float64))
    assert method.log_z == found
    twin.load_state_dict(method.state_dict())
    assert twin.log_z == found


def test_normalizer_of_random_rows_is_the_expected_one() -> None:
    bank, v = Bank(20_000, 128, momentum=0.5), F.normalize(torch.randn(64, 128), dim=1)
    logits = v @ bank.rows.T / 0.07
    assert math.exp(log_normalizer(logits, 20_000)) / 20_000 == pytest.approx(2.219, rel=0.05)


def test_forward_leaves_the_bank_as_it_is_and_after_step_moves_the_rows_of_the_batch_alone() -> None:
    method, batch = tiny_bank(momentum=0.3), batch_of([3, 1, 0, 19])
    before = method.bank.rows.clone()
    method(batch)["loss"].backward()
    assert torch.equal(method.bank.rows, before)
    v = method.embeddings[0]
    method.after_step(0.0)
    rest = [i for i in range(N) if i not in (3, 1, 0, 19)]
    assert torch.equal(method.bank.rows[rest], before[rest])
    torch.testing.assert_close(method.bank.rows[batch.index], F.normalize(0.3 * before[batch.index] + 0.7 * v, dim=1))
    torch.testing.assert_close(method.bank.rows[batch.index].norm(dim=1), torch.ones(4))
    after = method.bank.rows.clone()
    method.after_step(0.0)  # nothing is left to be written twice
    assert torch.equal(method.bank.rows, after)


def test_rows_of_every_micro_batch_are_written_in_their_order() -> None:
    method, whole = tiny_bank(norm=False), tiny_bank(norm=False)
    whole.load_state_dict(method.state_dict())
    for seed, index in ((1, [3, 5]), (2, [5, 6])):
        method(batch_of(index, seed=seed))
    method.after_step(0.0)
    embeddings = []
    for seed, index in ((1, [3, 5]), (2, [5, 6])):
        whole(batch_of(index, seed=seed))
        embeddings.append(whole.embeddings[0])
    (v3, _), (v5, v6) = embeddings
    write(whole.bank.rows, torch.tensor([3, 5, 6]), torch.stack([v3, v5, v6]), momentum=0.5)
    assert torch.equal(method.bank.rows, whole.bank.rows)


def test_proximal_term_adds_its_weight_times_the_squared_distance_to_the_old_row() -> None:
    plain, drawn = tiny_bank(norm=False).double(), tiny_bank(norm=False, proximal=30.0).double()
    drawn.load_state_dict(plain.state_dict())
    batch = batch_of([3, 1, 0, 19], dtype=torch.float64)
    without, with_it = plain(batch)["loss"], drawn(batch)["loss"]
    z = plain.projection(batch.views[0]).detach().requires_grad_()
    v = F.normalize(z, dim=1)
    rows = plain.bank.rows[batch.index]
    torch.testing.assert_close(with_it - without, 30 * (v - rows).square().sum(1).mean().detach())
    # The gradient adds 2 * 30 * (v - row) of each image before the derivative of the normalization.
    gradients = []
    for method in (plain, drawn):
        v = F.normalize(z, dim=1)
        method.head, method.backbone = nn.Identity(), nn.Identity()
        method.noise.draws, method.log_z = 0, 1.0
        gradients.append(torch.autograd.grad(method(Batch([z], batch.index, batch.label))["loss"], z)[0])
    v = F.normalize(z, dim=1)
    (expected,) = torch.autograd.grad(v, z, grad_outputs=2 * 30 * (v - rows).detach() / 4)
    torch.testing.assert_close(gradients[1] - gradients[0], expected)


def test_accuracy_is_the_share_of_images_whose_own_row_beats_those_of_all_others() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0], [2.0, 1.0, 2.0], [1.0, 1.0, 0.0], [3.0, 3.0, 3.0]])
    chosen = torch.tensor([[5, 1, 5], [5, 1, 6], [5, 1, 6], [5, 5, 5]])
    assert own_row_wins(logits, chosen).tolist() == [1, 0, 0, 1]  # itself among the noise is no other


def test_bank_takes_no_gradient_and_the_loss_is_that_of_the_normalized_projection() -> None:
    method, batch = tiny_bank(), batch_of([3, 1, 0, 19])
    scalars = method(batch)
    scalars["loss"].backward()
    v = F.normalize(method.projection(batch.views[0]), dim=1)
    torch.testing.assert_close(method.embeddings[0], v.detach())
    assert not method.bank.rows.requires_grad
    assert all(p.grad is not None and p.grad.any() for p in method.parameters())
    assert set(scalars) == {"loss", "accuracy"}


def test_head_is_one_linear_layer() -> None:
    head = tiny_bank().head
    assert type(head) is nn.Linear
    assert (head.in_features, head.out_features, head.bias is not None) == (8, 4, True)


def test_head_norm_takes_away_what_all_embeddings_share_and_has_no_weights() -> None:
    method, plain = tiny_bank(head_norm=True), tiny_bank()
    images = make_batch(8, views=1).views[0]
    images = images + 3.0 * images.abs().mean()  # all embeddings have a large common part
    assert plain.projection(images).mean(0).norm() > 0.1
    torch.testing.assert_close(method.projection(images).mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    assert list(method.norm.parameters()) == []
    assert method.head.bias is None  # the norm would take it away again


@pytest.mark.parametrize("loss", ["full", "nce", "softmax"])
def test_images_without_a_row_fill_the_bank_and_add_nothing_to_the_loss(loss: str) -> None:
    method = tiny_bank(norm=False, loss=loss, fill=True, proximal=2.0).double()
    assert not method.bank.rows.any()
    first = method(batch_of([3, 1, 0], dtype=torch.float64))["loss"]
    first.backward()
    assert first == 0
    assert not any(p.grad.any() for p in method.parameters())
    assert method.log_z is None
    method.after_step(0.0)
    torch.testing.assert_close(method.bank.rows[[3, 1, 0]], method.embeddings[0])  # not mixed with anything
    assert method.bank.known(torch.arange(5)).tolist() == [True, True, False, True, False]

    batch = batch_of([1, 7, 3, 8], seed=1, dtype=torch.float64)
    method.noise.draws, mixed = 0, method(batch)["loss"]
    method.noise.draws = 0
    known = Batch([batch.views[0][[0, 2]]], batch.index[[0, 2]], batch.label[[0, 2]])
    if loss == "full":  # the mean is over all four, of which two count
        torch.testing.assert_close(mixed, method(known)["loss"] / 2)
    z = method.projection(batch.views[0]).detach().requires_grad_()
    method.head, method.backbone = nn.Identity(), nn.Identity()
    (gradient,) = torch.autograd.grad(method(Batch([z], batch.index, batch.label))["loss"], z)
    assert gradient.any(1).tolist() == [True, False, True, False]


def test_stored_rows_classify_by_their_neighbors() -> None:
    method = tiny_bank(norm=False, num_images=8, dim=8)
    images = make_batch(8, views=1).views[0]
    for _ in range(20):
        step(method, Batch([images], torch.arange(8), torch.zeros(8)))
    labels = torch.arange(8)
    found = knn(method.stored(), labels, method.projection(images).detach(), labels, k=1, num_classes=8)
    assert found.top1 == 1.0
    shuffled = method.stored()[torch.arange(8).roll(1)]
    assert knn(shuffled, labels, method.projection(images).detach(), labels, k=1, num_classes=8).top1 == 0.0


def bank_of_a_part(
    state: dict[str, Tensor], batches: list[Batch], loss: str, fill: bool
) -> tuple[Tensor, float | None, Tensor]:
    method = tiny_bank(norm=False, loss=loss, fill=fill).double()
    method.load_state_dict(state)
    losses = []
    for batch in batches:
        view, index, label = (
            rows.chunk(collectives.world_size())[collectives.rank()]
            for rows in (batch.views[0], batch.index, batch.label)
        )
        losses.append(collectives.all_reduce_mean(step(method, Batch([view], index, label))))
    return method.bank.rows, method.log_z, torch.stack(losses)


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("loss", ["full", "nce", "softmax"])
def test_two_processes_keep_the_bank_and_the_normalizer_of_one(loss: str, fill: bool, pair: Pair) -> None:
    state = tiny_bank(norm=False, loss=loss, fill=fill).double().state_dict()
    steps = [[3, 1, 0, 3], [1, 3, 8, 7], [1, 7, 2, 1]]  # with `fill` the second process has no row in the second
    batches = [batch_of(index, seed=i, dtype=torch.float64) for i, index in enumerate(steps)]
    rows, log_z, losses = bank_of_a_part(state, batches, loss, fill)
    (rows1, log_z1, losses1), (rows2, log_z2, _) = pair.run(bank_of_a_part, state, batches, loss, fill)
    assert torch.equal(rows1, rows2)
    assert log_z1 == log_z2
    torch.testing.assert_close(rows1, rows)
    torch.testing.assert_close(losses1, losses)
    assert (log_z is None) == (loss != "nce")
    assert log_z1 == (None if log_z is None else pytest.approx(log_z))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "nse"}, "loss is 'nse', but it must be one of: full, nce, softmax"),
        ({"negatives": 0}, "negatives is 0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"proximal": -1.0}, "proximal is -1.0"),
        ({"dim": 0}, "dim is 0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_bank(**changes)
