"""Division of the training pool into "train" and "val"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sslcli.data.sources.split import train_and_val


def divided(n: int, *, values: Tensor | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
    given = {"labeled": torch.ones(n, dtype=torch.bool), "held_out": None, "seed": 0, "limit": None}
    given |= {"val_fraction": 0.25, "pretrain_on_val": False} | changes
    return train_and_val(torch.arange(n) if values is None else values, **given)


def test_val_is_a_part_of_train_only_if_it_is_pre_trained_on() -> None:
    (train, val), (everything, same) = divided(40), divided(40, pretrain_on_val=True)
    assert (len(train), len(val)) == (30, 10)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(40))
    assert torch.equal(everything, torch.arange(40))
    assert torch.equal(val, same)


def test_the_division_depends_on_the_values_and_the_seed_and_not_on_the_order_of_the_images() -> None:
    values = torch.arange(40).flip(0)
    val = divided(40, values=values)[1]
    assert torch.equal(values[val].sort().values, divided(40)[1])
    assert not torch.equal(divided(40, seed=1)[1], divided(40)[1])


def test_images_that_are_held_out_without_a_label_are_in_no_split() -> None:
    held_out = torch.arange(8) < 4
    train, val = divided(8, held_out=held_out, labeled=torch.arange(8) % 2 == 0, pretrain_on_val=True)
    assert (train.tolist(), val.tolist()) == ([4, 5, 6, 7], [0, 2])
    with pytest.raises(ValueError, match=r"leaves none of the 8 images for training"):
        divided(8, held_out=torch.ones(8, dtype=torch.bool))
