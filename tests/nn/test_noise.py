"""Random numbers of a method depend on the image and not on the process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from processes import Pair
from sslcli.nn.noise import Noise

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
        torch.rand(3, generator=source.shared()),
    ]


def test_two_processes_draw_the_two_halves_of_what_one_draws(pair: Pair) -> None:
    whole, halves = draw(8), pair.run(draw, 4)
    for number, expected in enumerate(whole[:3]):
        assert torch.equal(torch.cat([half[number] for half in halves]), expected)
    assert all(torch.equal(half[3], whole[3]) for half in halves)


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
