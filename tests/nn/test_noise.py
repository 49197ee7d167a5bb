"""Random numbers of a method depend on the image and not on the process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from processes import Pair
from sslcli.nn import noise as noise_module
from sslcli.nn.noise import Noise
from synchronizations import CUDA, counted, move_to_device

CPU = torch.device("cpu")


def noise(seed: int = 0) -> Noise:
    torch.manual_seed(seed)
    return Noise()


def draw(num_rows: int) -> list[Tensor]:
    source = noise()
    return [
        source.normal(num_rows, 3, 2, device=CPU),
        source.uniform(num_rows, 5, device=CPU),
        source.integers(7, num_rows, 4, device=CPU),
        source.permutation(num_rows, device=CPU),
        torch.rand(3, generator=source.shared()),
    ]


def test_two_processes_draw_the_two_halves_of_what_one_draws(pair: Pair) -> None:
    whole, halves = draw(8), pair.run(draw, 4)
    for number, expected in enumerate(whole[:4]):
        assert torch.equal(torch.cat([half[number] for half in halves]), expected)
    assert all(torch.equal(half[4], whole[4]) for half in halves)
    assert torch.equal(whole[3], torch.randperm(8, generator=noise().shared()))


def test_compiled_code_draws_the_same_numbers() -> None:
    compiled, source, other = torch.compile(draw_tensors, backend="aot_eager", fullgraph=True), noise(), noise()
    for _ in range(2):
        torch.testing.assert_close(compiled(source), draw_tensors(other), rtol=0, atol=0)
    assert source.get_extra_state().tolist() == other.get_extra_state().tolist()


def draw_tensors(source: Noise) -> tuple[Tensor, Tensor, Tensor]:
    return source.normal(4, 3, device=CPU), source.integers(7, 4, device=CPU), source.permutation(4, device=CPU)


def test_rows_and_draws_differ_and_are_distributed_as_they_say() -> None:
    source = noise()
    normal, again = source.normal(500, 50, device=CPU), source.normal(500, 50, device=CPU)
    assert len(normal.unique(dim=0)) == 500
    assert not torch.equal(normal, again)
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    whole = source.integers(4, 1000, device=CPU)
    assert whole.bincount().tolist() == pytest.approx([250] * 4, abs=70)
    uniform = source.uniform(500, 50, device=CPU)
    assert 0 <= float(uniform.min()) < float(uniform.max()) < 1
    assert abs(float(uniform.mean()) - 0.5) < 0.02


def test_another_seed_draws_others_and_a_loaded_state_goes_on() -> None:
    first, other = noise(0), noise(1)
    first.normal(3, 2, device=CPU)
    state = first.state_dict()
    expected = first.normal(3, 2, device=CPU)
    assert not torch.equal(other.normal(3, 2, device=CPU), expected)
    other.load_state_dict(state)
    assert torch.equal(other.normal(3, 2, device=CPU), expected)


def values(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    source = noise()
    return source.uniform(count, *shape, device=CPU).double(), source.normal(count, *shape, device=CPU).double()


def kolmogorov_smirnov(numbers: Tensor, cumulative: Tensor) -> float:
    """The largest difference from the cumulative distribution, times sqrt(n). It exceeds 1.95 with probability 0.1 %.

    `cumulative` is the cumulative distribution function of the sorted numbers.
    """
    steps = torch.arange(len(numbers) + 1, dtype=torch.float64) / len(numbers)
    return float(torch.maximum(steps[1:] - cumulative, cumulative - steps[:-1]).max()) * len(numbers) ** 0.5


def test_numbers_have_the_distribution_uniform_or_normal() -> None:
    uniform, normal = (part.flatten().sort().values for part in values(1000, 1000))
    assert kolmogorov_smirnov(uniform, uniform) < 1.95
    assert kolmogorov_smirnov(normal, torch.special.ndtr(normal)) < 1.95
    assert abs(float(uniform.mean()) - 0.5) < 4 * (1 / 12e6) ** 0.5
    assert abs(float(normal.mean())) < 4e-3
    assert abs(float(normal.var()) - 1) < 4 * (2 / 1e6) ** 0.5
    assert abs(float((normal**4).mean()) - 3) < 4 * (96 / 1e6) ** 0.5
    assert 4.5 < float(normal.abs().max()) < 5.8


def test_each_image_each_number_and_each_draw_alone_is_uniform() -> None:
    source = noise()
    by_draw = torch.stack([source.uniform(1, 1, device=CPU).double().flatten()[0] for _ in range(4000)])
    by_seed = torch.stack([noise(seed).uniform(1, 1, device=CPU).double().flatten()[0] for seed in range(2000)])
    by_image = source.uniform(20_000, 1, device=CPU).double().flatten()
    by_number = source.uniform(1, 20_000, device=CPU).double().flatten()
    for numbers in (by_draw, by_seed, by_image, by_number):
        ordered = numbers.sort().values
        assert kolmogorov_smirnov(ordered, ordered) < 1.95
        pairs = torch.histogramdd(torch.stack((numbers[:-1], numbers[1:]), 1), [8, 8], range=[0, 1, 0, 1]).hist
        expected = (len(numbers) - 1) / 64
        assert float((pairs - expected).square().sum() / expected) < 63 + 4 * (2 * 63) ** 0.5  # chi square of 63


def test_neighbors_are_not_correlated() -> None:
    """Neighbors are numbers of an image, images, draws, seeds, and bits of a number."""
    sources = [noise(0), noise(0), noise(1)]
    sources[1].draws = 1
    here, later, other = (source.normal(500, 500, device=CPU).double() for source in sources)
    pairs = [(here[:, :-1], here[:, 1:]), (here[:-1], here[1:]), (here[:-1, 1:], here[1:, :-1]), (here, later)]
    for first, second in [*pairs, (here, other), (here[::2], later[1::2])]:
        for power in (1, 2):
            both = torch.stack((first.flatten() ** power, second.flatten() ** power))
            assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / both.shape[1] ** 0.5
    bits = (sources[0].uniform(500, 500, device=CPU) * 2**24).long().flatten()[:, None] >> torch.arange(24) & 1
    correlations = torch.corrcoef(bits.double().T).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / len(bits) ** 0.5
    assert float((bits.double().mean(0) - 0.5).abs().max()) < 4 * 0.5 / len(bits) ** 0.5


def test_no_numbers_are_repeated_between_images_draws_and_seeds() -> None:
    drawn = []
    for seed in range(3):
        source = noise(seed)
        drawn += [source.integers(1 << 31, 64, 256, device=CPU).flatten() for _ in range(20)]
    numbers = torch.cat(drawn)
    expected = len(numbers) ** 2 / 2 / 2**31  # number of pairs of equal numbers among independent ones
    repeated = len(numbers) - len(numbers.unique())
    assert abs(repeated - expected) < 5 * expected**0.5
    followers = (numbers[:-1] << 31) | numbers[1:]
    assert len(followers.unique()) == len(followers)  # no two numbers are repeated together


def test_integers_are_uniform_and_permutations_equally_frequent() -> None:
    source = noise()
    counts = source.integers(50, 1000, 100, device=CPU).flatten().bincount(minlength=50)
    assert float((counts - 2000).square().sum() / 2000) < 49 + 4 * (2 * 49) ** 0.5
    orders = source.uniform(12_000, 4, device=CPU).argsort(1) @ torch.tensor([64, 16, 4, 1])
    frequency = orders.unique(return_counts=True)[1].double()
    assert len(frequency) == 24
    assert float((frequency - 500).square().sum() / 500) < 23 + 4 * (2 * 23) ** 0.5


def test_the_state_of_a_version_that_counted_all_draws_together_can_be_loaded() -> None:
    first, other = noise(0), noise(1)
    other.load_state_dict({"_extra_state": torch.tensor([first.seed, 2])})
    for _ in range(2):
        first.normal(1, 2, device=CPU)
        first.shared()
    assert other.state_dict()["_extra_state"].tolist() == first.state_dict()["_extra_state"].tolist()
    assert torch.equal(other.normal(3, 2, device=CPU), first.normal(3, 2, device=CPU))
    assert other.shared().initial_seed() == first.shared().initial_seed()


@pytest.mark.parametrize("num_images", [2, 512])
@pytest.mark.parametrize("kind", ["normal", "uniform", "integers"])
def test_a_draw_on_a_gpu_launches_at_most_30_kernels_and_draws_the_numbers_of_the_cpu(
    kind: str, num_images: int
) -> None:
    shape = (num_images, 3, 25)

    def drawn(source: Noise, device: torch.device) -> Tensor:
        return getattr(source, kind)(*([7] if kind == "integers" else []), *shape, device=device)

    expected = drawn(noise(), CPU)
    source = noise()
    with counted() as counter:
        move_to_device(source)
        found = drawn(source, CUDA)
        assert (counter.found, 0 < counter.kernels.total() <= 30) == ([], True)
        # The last bit of a logarithm or cosine depends on its place in a vector of the CPU.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if kind == "normal" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found.cpu(), expected, **tolerance)


def test_draws_whose_keys_differ_by_a_few_counts_do_not_share_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_module, "_DRAW", 5 * noise_module._GOLDEN & noise_module._MASK)
    source = noise()
    first, second = (source.uniform(4, 100, device=CPU) for _ in range(2))
    assert float((first[:, 5:] == second[:, :-5]).float().mean()) < 0.01


def test_each_bit_of_an_index_flips_each_bit_of_the_numbers_with_probability_one_half() -> None:
    source = noise()
    drawn = torch.stack([source.uniform(128, 128, device=CPU) for _ in range(16)])  # draw, image, number
    numbers = (drawn * 2**24).long()
    for dim, size in enumerate(numbers.shape):
        for bit in range(size.bit_length() - 1):
            other = numbers.index_select(dim, torch.arange(size) ^ (1 << bit))
            flips = (numbers ^ other).flatten()[:, None] >> torch.arange(24) & 1
            pairs = len(flips) / 2  # each pair occurs twice
            assert float((flips.double().mean(0) - 0.5).abs().max()) < 5 * 0.5 / pairs**0.5
