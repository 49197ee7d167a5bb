"""Comparison of the tensors under a prefix of a checkpoint with the parameters and buffers of a network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslcli.weights.files import is_noise_state, short, unwrapped
from sslcli.weights.key_layouts import Flat
from sslcli.weights.positions import resized_positions
from sslcli.weights.prefixes import PARTS_OF_BACKBONES, counts_of_prefixes

COUNTER = "num_batches_tracked"  # of BatchNorm; files of PyTorch before 0.4.1 lack it, and it does not change features


@dataclass(frozen=True)
class Place:
    """The tensors of a checkpoint under one prefix, compared with a network.

    Attributes:
        prefix: the start of the keys, "" or ending with a dot.
        state: the tensors that fit, by the names of the network without the name of a wrapper.
        missing: names of the network that are not in the checkpoint.
        unknown: keys of the checkpoint that belong to a backbone, but not to this one.
        shapes: descriptions of differing shapes.
        notes: changes of the tensors, for the user.
    """

    prefix: str
    state: dict[str, Tensor]
    missing: list[str]
    unknown: list[str]
    shapes: list[str]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """True if the checkpoint has exactly the weights of the network here."""
        return not (self.missing or self.unknown or self.shapes)


def names_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of `net` by name, without the name of a wrapper.

    States of random number generators, and extra states that are no tensors, are omitted.
    """
    state = unwrapped(net, net.state_dict())
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and not is_noise_state(name)}


def places(flat: Flat, own: dict[str, Tensor]) -> Iterator[Place]:
    """Yield every place in a flattened checkpoint that has a name of a network, the most names first.

    `own` are the names of the network with their tensors, see `names_of`.
    """
    for prefix, _ in counts_of_prefixes(flat, own).most_common():
        yield place(flat, prefix, own)


def place(flat: Flat, prefix: str, own: dict[str, Tensor]) -> Place:
    """Compare the tensors under `prefix` of a flattened checkpoint with a network, see `places`."""
    state, missing, shapes, notes = {}, [], [], []
    for name, tensor in own.items():
        value = flat.get(prefix + name)
        if value is None and name.endswith(COUNTER):
            value = torch.zeros(tensor.shape, dtype=tensor.dtype)
        elif value is None:
            missing.append(name)
            continue
        if value.shape != tensor.shape and name == "pos_embed" and tensor.ndim == 3:
            resized = resized_positions(value, tensor.shape[1])
            if resized and resized[0].shape == tensor.shape:
                value, note = resized
                notes.append(note)
        if value.shape != tensor.shape:
            shapes.append(f"{short(name)} is {tuple(value.shape)} and should be {tuple(tensor.shape)}")
            continue
        state[name] = value
    parts = PARTS_OF_BACKBONES | {name.partition(".")[0] for name in own}
    unknown = [
        key
        for key in flat
        if key.startswith(prefix) and key[len(prefix) :] not in own and key[len(prefix) :].partition(".")[0] in parts
    ]
    return Place(prefix, state, missing, unknown, shapes, notes)
