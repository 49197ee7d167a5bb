from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sslcli.nn import contrastive
from sslcli.nn.contrastive import Contrast, check_momentum, cosine_distance, info_nce, nt_xent_symmetric


def unit_rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=1)


def explicit_info_nce(
    query: Tensor, positive: Tensor, negatives: Tensor, temperature: float, exclude: Tensor | None = None
) -> Contrast:
    """The same loss, from the full matrix and a loop."""
    rows, hits = [], 0
    for i in range(len(query)):
        left_out = set() if exclude is None else set(exclude[i].tolist())
        logits = [query[i] @ negatives[j] / temperature for j in range(len(negatives)) if j not in left_out]
        own = query[i] @ positive[i] / temperature
        rows.append(torch.logsumexp(torch.stack([own, *logits]), 0) - own)
        hits += all(own > logit for logit in logits)
    return Contrast(torch.stack(rows).mean(), torch.tensor(hits / len(query), dtype=query.dtype))


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("chunk_values", [1, 20, 33, 1 << 22])
def test_chunks_give_the_values_and_gradients_of_the_whole_matrix(
    chunk_values: int, excluding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "CHUNK_VALUES", chunk_values)  # 1, 1, 3 and 7 rows at a time
    inputs = [unit_rows(7, 4).requires_grad_(), unit_rows(7, 4).requires_grad_(), unit_rows(11, 4).requires_grad_()]
    exclude = torch.stack([torch.randperm(11)[:3] for _ in range(7)]) if excluding else None
    found = info_nce(*inputs, temperature=0.2, exclude=exclude)
    expected = explicit_info_nce(*inputs, 0.2, exclude)
    torch.testing.assert_close(tuple(found), tuple(expected))
    # scaled, since a loss is rarely differentiated as it is
    grads, expected_grads = (torch.autograd.grad(3 * result.loss, inputs) for result in (found, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (7, 4), (256, 4096)])
@pytest.mark.parametrize("temperature", [0.2, 0.001])  # the second makes weights vanish beside a later peak
def test_blocks_of_a_queue_give_the_values_and_gradients_of_the_whole_matrix(
    block: tuple[int, int], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "CPU_BLOCK", block)
    inputs = [unit_rows(7, 4).requires_grad_(), unit_rows(7, 4).requires_grad_()]
    queue = torch.cat([unit_rows(11, 4), inputs[0].detach()[:3]])  # the hardest negatives come last
    found, expected = (f(*inputs, queue, temperature=temperature) for f in (info_nce, explicit_info_nce))
    torch.testing.assert_close(tuple(found), tuple(expected))
    grads, expected_grads = (torch.autograd.grad(result.loss, inputs) for result in (found, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("pairs", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("block", [(1, 1), (2, 2), (3, 3), (256, 4096)])
def test_mutual_similarities_give_what_both_directions_give(
    pairs: int, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "CPU_BLOCK", block)
    inputs = [unit_rows(pairs, 4).requires_grad_() for _ in range(2)]
    rows, partners = torch.cat(inputs), torch.cat(inputs[::-1])
    exclude = torch.stack([torch.arange(2 * pairs), torch.arange(2 * pairs).roll(pairs)], 1)
    found = nt_xent_symmetric(rows, temperature=0.05)
    expected = explicit_info_nce(rows, partners, rows, 0.05, exclude)
    torch.testing.assert_close(tuple(found), tuple(expected))
    grads, expected_grads = (torch.autograd.grad(3 * result.loss, inputs) for result in (found, expected))
    torch.testing.assert_close(grads, expected_grads)


def test_mutual_similarities_refuse_a_temperature_at_which_sums_may_overflow() -> None:
    with pytest.raises(ValueError, match=r"temperature is 0\.01"):
        nt_xent_symmetric(unit_rows(4, 4), temperature=0.01)


def test_gradient_passes_a_check_by_finite_differences() -> None:
    inputs = [torch.randn(shape, 3, dtype=torch.float64, requires_grad=True) for shape in (4, 4, 5)]
    assert torch.autograd.gradcheck(lambda *args: info_nce(*args, temperature=0.5).loss, inputs)


def test_gradient_goes_only_where_it_is_asked_for() -> None:
    query, positive, negatives = unit_rows(3, 4).requires_grad_(), unit_rows(3, 4), unit_rows(5, 4)
    info_nce(query, positive, negatives, temperature=0.1).loss.backward()
    assert query.grad is not None
    assert positive.grad is None
    assert negatives.grad is None


@pytest.mark.parametrize("excluding", [False, True])
def test_absent_queries_add_nothing_to_the_means_and_get_no_gradient(excluding: bool) -> None:
    inputs, negatives = [unit_rows(7, 4).requires_grad_() for _ in range(2)], unit_rows(11, 4)
    exclude = torch.arange(7)[:, None] if excluding else None
    present = torch.tensor([True, False, True, True, False, True, True])
    found = info_nce(*inputs, negatives, temperature=0.2, exclude=exclude, present=present)
    kept = [rows[present] for rows in inputs]
    mean = explicit_info_nce(*kept, negatives, 0.2, None if exclude is None else exclude[present])
    expected = [value * 5 / 7 for value in mean]
    torch.testing.assert_close(list(found), expected)
    grads, expected_grads = (torch.autograd.grad(loss, inputs) for loss in (found.loss, expected[0]))
    torch.testing.assert_close(grads, expected_grads)
    every = info_nce(*inputs, negatives, temperature=0.2, exclude=exclude, present=torch.ones(7, dtype=torch.bool))
    assert torch.equal(every.loss, info_nce(*inputs, negatives, temperature=0.2, exclude=exclude).loss)


def test_excluded_columns_might_as_well_hold_anything() -> None:
    query, positive, negatives = unit_rows(3, 4), unit_rows(3, 4), unit_rows(6, 4)
    exclude = torch.full((3, 1), 2)
    without = torch.cat([negatives[:2], negatives[3:]])
    expected = info_nce(query, positive, without, temperature=0.1)
    negatives[2] = query[0]
    torch.testing.assert_close(info_nce(query, positive, negatives, temperature=0.1, exclude=exclude), expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in tensors]
        self.largest = max([self.largest, *sizes])
        return result


def test_no_tensor_is_as_large_as_the_matrix_of_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "CHUNK_VALUES", 2048)
    query, positive, negatives = (unit_rows(n, 8, dtype=torch.float32) for n in (64, 64, 512))
    for tensor in (query, positive, negatives):
        tensor.requires_grad_()
    with LargestTensor() as seen:
        info_nce(query, positive, negatives, temperature=0.1).loss.backward()
    assert seen.largest == negatives.numel() == 4096  # its gradient; the matrix would have 32768
    with LargestTensor() as seen:
        logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ negatives.T], 1)
        F.cross_entropy(logits, torch.zeros(64, dtype=torch.long)).backward()
    assert seen.largest >= 32768  # the measurement itself works


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_under_autocast_is_computed_in_float32(dtype: torch.dtype) -> None:
    inputs = [unit_rows(n, 8).to(dtype).requires_grad_() for n in (4, 4, 600)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(*inputs, temperature=0.01)
        distance = cosine_distance(inputs[0], inputs[1])
    found.loss.backward()
    expected = explicit_info_nce(*(x.detach().double() for x in inputs), 0.01)
    assert found.loss.dtype == distance.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    assert all(x.grad is not None and x.grad.dtype == dtype and x.grad.isfinite().all() for x in inputs)


def test_sharpest_temperatures_do_not_overflow() -> None:
    query = unit_rows(4, 8, dtype=torch.float32).requires_grad_()
    loss = info_nce(query, -query.detach(), query.detach(), temperature=1e-3).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2000.0, rel=1e-4)
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_order_of_rows_and_of_negatives_does_not_matter() -> None:
    query, positive, negatives = unit_rows(5, 4), unit_rows(5, 4), unit_rows(9, 4)
    expected = info_nce(query, positive, negatives, temperature=0.1)
    rows, columns = torch.randperm(5), torch.randperm(9)
    found = info_nce(query[rows], positive[rows], negatives[columns], temperature=0.1)
    torch.testing.assert_close(found, expected)


def test_indistinguishable_candidates_make_it_a_guess() -> None:
    ones = F.normalize(torch.ones(3, 4, dtype=torch.float64), dim=1)
    found = info_nce(ones, ones, ones[:1].expand(9, -1), temperature=0.1)
    torch.testing.assert_close(found.loss, torch.tensor(10.0, dtype=torch.float64).log())
    assert float(found.accuracy) == 0.0  # ties are not won


def test_cosine_distance_ignores_lengths_and_takes_no_gradient_to_the_target() -> None:
    prediction, target = torch.randn(2, 5, 4, dtype=torch.float64)
    prediction.requires_grad_()
    target.requires_grad_()
    expected = (2 - 2 * F.cosine_similarity(prediction, target, dim=1)).mean()
    found = cosine_distance(5 * prediction, target / 3)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert prediction.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}, .* must be positive"):
        info_nce(*(torch.ones(2, 2),) * 3, temperature=temperature)


@pytest.mark.parametrize("momentum", [-0.01, 1.01, float("nan")])
def test_momentum_must_lie_between_zero_and_one(momentum: float) -> None:
    with pytest.raises(ValueError, match=f"momentum is {momentum}, but it must lie in"):
        check_momentum(momentum)


def test_momentum_of_zero_and_one_are_allowed() -> None:
    check_momentum(0.0)
    check_momentum(1.0)
    check_momentum(0.0, 0.0)
    check_momentum(0.5, 1.0)


@pytest.mark.parametrize("final", [0.89, 1.01, float("nan")])
def test_the_final_momentum_lies_between_the_first_and_one(final: float) -> None:
    with pytest.raises(ValueError, match=f"final_momentum is {final}, .* choose a value from 0.9 to 1"):
        check_momentum(0.9, final)
