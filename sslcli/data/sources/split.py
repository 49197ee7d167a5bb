"""Division of the training pool into "train" and "val" by a hash, so that other files hardly change the division."""

from __future__ import annotations

import torch
from torch import Tensor

from sslcli.data import rng


def train_and_val(
    hashes: Tensor,
    *,
    labeled: Tensor,
    held_out: Tensor | None,
    seed: int,
    val_fraction: float,
    pretrain_on_val: bool,
    limit: int | None,
) -> tuple[Tensor, Tensor]:
    """Return the sorted positions (n,) of "train" and of "val" in a pool of M images.

    Args:
        hashes: (M,) int64, one value per image. The images are sorted by a hash of `seed` and this value. Images with
            equal values are sorted by position.
        labeled: (M,) bool, True if labeled. Only labeled images are in "val", because a probe needs labels.
        held_out: (M,) bool, True for images that must not be in "train". The labeled ones form "val". None =
            `val_fraction` and `pretrain_on_val` decide.
        seed: seed of the order.
        val_fraction: fraction of the labeled images that forms "val": those that come first in the order.
        pretrain_on_val: whether these images are also in "train".
        limit: the largest number of images in "train", and in "val"; None = no limit.

    Raises ValueError if no image is left for "train".
    """
    order = rng.mix(seed, hashes).argsort(stable=True)
    candidates = order[labeled[order]]
    first = candidates[: round(len(candidates) * val_fraction)]
    val = first if held_out is None else candidates[held_out[candidates]]
    excluded = torch.zeros(len(hashes), dtype=torch.bool) if held_out is None else held_out.clone()
    excluded[val] = True
    train = order[~excluded[order]]
    if held_out is None and pretrain_on_val:
        if limit is not None:  # "train" has `limit` images, and "val" is the usual fraction of them
            val = val[: max(1, round(limit * val_fraction)) if limit > 1 else 0]
        num_other = len(train) if limit is None else limit - len(val)
        train = torch.cat([val, train[:num_other]])
    if len(train) == 0:
        raise ValueError(
            f"dataset.val_fraction is {val_fraction}, which leaves none of the {len(hashes)} images for training: "
            "lower dataset.val_fraction"
        )
    return train[:limit].sort().values, val[:limit].sort().values
