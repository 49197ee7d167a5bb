from __future__ import annotations

import pytest
import torch

from sslcli.data.rng import mix, permutation, uniform


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])


def test_the_hash_is_the_one_that_old_runs_were_made_with() -> None:
    assert mix(0).item() == -2152535657050944081
    assert mix(1, 2).item() == 5886236958684341581
    assert mix(5, torch.arange(3)).tolist() == [-5970105824593227592, 2173552090174352397, 8773334297501670590]
    assert permutation(10, 3, 4).tolist() == [0, 8, 6, 4, 1, 9, 2, 7, 5, 3]


def test_mix_equals_splitmix64_written_with_python_integers() -> None:
    mask = (1 << 64) - 1

    def reference(*keys: int) -> int:
        state = 0
        for key in keys:
            x = ((state + 0x9E3779B97F4A7C15) & mask) ^ (key & mask)
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
            state = x ^ (x >> 31)
        return state - (1 << 64) if state >= 1 << 63 else state

    for keys in [(0,), (-1,), (1, 2, 3), (7, 5 << 32, 123456789), (-(1 << 63), (1 << 63) - 1)]:
        assert mix(*keys).item() == reference(*keys)


def test_integers_and_tensors_give_the_same_numbers_and_broadcast() -> None:
    grid = mix(3, torch.arange(4).unsqueeze(1), torch.arange(5, dtype=torch.int32))
    assert grid.shape == (4, 5)
    assert grid.dtype == torch.int64
    assert grid[2, 3].item() == mix(3, 2, 3).item()
    streams = uniform(grid.unsqueeze(0), torch.arange(6).view(6, 1, 1))
    assert torch.equal(streams[4], uniform(grid, 4))


def test_order_and_number_of_keys_matter() -> None:
    results = {mix(1, 2).item(), mix(2, 1).item(), mix(1, 2, 0).item(), mix(0, 1, 2).item(), mix(3).item()}
    assert len(results) == 5


def test_nearby_keys_never_collide() -> None:
    # The structure of keys in use: seeds, visits with a repeat in the high bits, positions, views.
    seeds, visits = torch.arange(4).view(-1, 1, 1, 1), torch.tensor([0, 1, 2, 1 << 32, 2 << 32]).view(-1, 1, 1)
    keys = mix(seeds, visits, torch.arange(5000).view(-1, 1), torch.arange(2))
    assert keys.unique().numel() == 4 * 5 * 5000 * 2


def test_one_changed_bit_of_a_key_changes_half_of_the_bits() -> None:
    keys = torch.arange(2000)
    for bit in (0, 1, 7, 31, 40):
        other = keys ^ (1 << bit)
        for difference in (mix(keys, 5) ^ mix(other, 5), mix(5, keys) ^ mix(5, other)):
            flips = torch.stack([(difference >> k) & 1 for k in range(64)]).double().mean(1)
            assert (flips - 0.5).abs().max() < 0.06  # 5 standard deviations are 0.056


@pytest.mark.parametrize("shift", [0, 20, 32])
def test_uniform_is_uniform_over_consecutive_keys(shift: int) -> None:
    count, bins = 100_000, 64
    values = uniform(mix(11, torch.arange(count) << shift), 3)
    assert values.dtype == torch.float32
    expected = count / bins
    chi_square = ((torch.histc(values, bins, 0, 1) - expected) ** 2 / expected).sum()
    assert 24 < chi_square < 120  # 63 degrees of freedom; outside of it with probability below 1e-5


def test_keys_streams_and_neighbors_are_uncorrelated() -> None:
    keys = mix(0, torch.arange(50_000))
    values = uniform(keys, 0)
    limit = 5 / 50_000**0.5
    assert abs(_correlation(values[1:], values[:-1])) < limit
    assert abs(_correlation(values, uniform(keys, 1))) < limit
    assert abs(_correlation(values, uniform(mix(1, torch.arange(50_000)), 0))) < limit
    assert abs(_correlation(values, uniform(mix(keys, 0), 0))) < limit


def test_uniform_stays_below_high_and_reaches_both_ends() -> None:
    values = uniform(mix(0, torch.arange(2_000_000)), 0, 0.6, 1.4)
    low, high = torch.tensor(0.6), torch.tensor(1.4)
    assert values.min() >= low
    assert values.max() < high
    assert values.min() < 0.60001
    assert values.max() > 1.39999
    assert (uniform(mix(torch.arange(9)), 0, 2.0, 2.0) == 2.0).all()


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_each_number_once(n: int) -> None:
    order = permutation(n, 0, 1)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_of_other_keys_are_unrelated_and_fair() -> None:
    assert not torch.equal(permutation(100, 0, 1), permutation(100, 1, 0))
    orders = torch.stack([permutation(6, 0, epoch) for epoch in range(1500)])
    for place in range(6):
        counts = torch.bincount(orders[:, place], minlength=6)
        assert (counts - 250).abs().max() < 75  # 5 standard deviations are 72


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no keys"):
        mix()
    with pytest.raises(ValueError, match=r"float32, but keys must be integers"):
        mix(torch.rand(3))
    with pytest.raises(ValueError, match=r"key 1.5, but keys must be integers"):
        mix(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"keys must be integers in \[-2\*\*63"):
        mix(1 << 63)
    with pytest.raises(ValueError, match="low must not exceed high"):
        uniform(mix(0), 0, 1.0, 0.0)
    with pytest.raises(ValueError, match="n=-1"):
        permutation(-1, 0)
