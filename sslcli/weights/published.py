"""Search for the weights of a backbone in a published checkpoint. Every key is taken, dropped or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.backbones.base import Backbone
from sslcli.errors import ConfigError
from sslcli.nn.transformer import Attention
from sslcli.weights.files import first_keys, is_noise_state, short, wrapped
from sslcli.weights.fitting import Place, names_of, places
from sslcli.weights.key_layouts import LAYOUTS, Flat, flattened
from sslcli.weights.nearest import nearest_backbone
from sslcli.weights.prefixes import groups, matches, rank

# The ViT-S of DeiT, timm and sslcli has 6 heads, and its weights have the same shapes.
MOCO_V3_SMALL = {"width": 384, "num_heads": 12}


@dataclass(frozen=True)
class Found:
    """The weights of a backbone in a checkpoint, and what became of the other tensors.

    Attributes:
        state: state dict with the names of the backbone, in the dtypes of the backbone. It loads strictly.
        prefix: start of the keys of the backbone in the checkpoint, such as `state_dict.module.encoder_q.`, or "".
        taken: number of tensors that were taken from the checkpoint.
        dropped: number of tensors of each group beside the backbone, such as `fc.*`.
        others: further prefixes whose weights would fit the backbone.
        notes: what was changed, and what the shapes cannot show, for the user.
    """

    state: dict[str, Any]
    prefix: str
    taken: int
    dropped: dict[str, int]
    others: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self, where: str) -> str:
        """Return one line that states what was taken from `where` and what was dropped."""
        prefix = f" with the prefix {short(self.prefix)}" if self.prefix else ""
        dropped = ", ".join(f"{short(group)} ({number})" for group, number in self.dropped.items())
        others = f"; would fit too: {', '.join(map(short, self.others))}" if self.others else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{where}: {self.taken} tensors taken{prefix}; dropped: {dropped or 'none'}{others}{notes}"

    def provenance(self) -> dict[str, Any]:
        """Return the facts of the summary as JSON values, for a result file."""
        return {
            "weights_prefix": self.prefix,
            "weights_taken": self.taken,
            "weights_dropped": self.dropped,
            "weights_notes": list(self.notes),
        }


def find_weights(
    content: Mapping[str, Any], net: nn.Module, *, prefix: str | None, where: str, key: str = "weights_prefix"
) -> Found:
    """Find the weights of the backbone `net` in a checkpoint. `net` is not changed.

    The checkpoint may have nested dictionaries, prefixes, heads, optimizer states and several networks. The network
    that the paper of its method evaluates is preferred, see `prefixes.RANKS`. float16 and bfloat16 are converted.

    Args:
        content: tensors in nested dictionaries, as read from a file.
        net: the backbone.
        prefix: the prefix of the weights to take. Names of outer dictionaries may be omitted. None chooses it.
        where: name of the source, for messages.
        key: name of the user's setting for `prefix`, for messages.

    Raises ConfigError if no weights or several equally good ones fit all of the backbone, or if the weights are no
    floating-point numbers, as in a quantized file.
    """
    flat = flattened(content)
    if not flat:
        raise ConfigError(f"{where} contains no tensors: give a file with the weights of a network")
    own = names_of(net)
    best: tuple[Place, Flat] | None = None
    for layout in LAYOUTS:
        renamed = layout(flat)
        if renamed is None:
            continue
        every = [place for place in places(renamed, own) if _is_meant(place.prefix, prefix, net)]
        fitting = [place for place in every if place.fits]
        if fitting:
            chosen = _chosen(fitting, where, key)
            _check_dtypes(chosen, own, where)
            return _found(chosen, fitting, renamed, len(flat), net)
        partial = max(every, key=lambda place: (len(place.state), -rank(place.prefix)), default=None)
        if partial is not None and (best is None or len(partial.state) > len(best[0].state)):
            best = partial, renamed
    raise _refusal(best[0] if best else None, flat, own, prefix, where, key)


def suggested_backbone(content: Mapping[str, Any]) -> str:
    """Return a sentence with the backbone of sslcli whose weights a checkpoint contains, or "" if there is none."""
    flat = flattened(content)
    found = (nearest_backbone(renamed) for layout in LAYOUTS if (renamed := layout(flat)) is not None)
    return next((sentence for sentence in found if sentence), "")


def _is_meant(found: str, wanted: str | None, net: nn.Module) -> bool:
    """Return True if the prefix `wanted` of the user, or of a run, means the prefix `found`."""
    if wanted is None:
        return True
    name = net.wrapped_name if isinstance(net, Backbone) else ""
    return matches(found, wanted) or (bool(name) and matches(found, f"{wanted.rstrip('.')}.{name}".lstrip(".")))


def _chosen(fitting: list[Place], where: str, key: str) -> Place:
    """Return the place of the lowest rank. Raises ConfigError if another one has the same rank and other values."""
    fitting.sort(key=lambda place: rank(place.prefix))
    first = fitting[0]
    equal = [place for place in fitting if rank(place.prefix) == rank(first.prefix)]
    different = [
        place
        for place in equal[1:]
        if any(not torch.equal(first.state[name], place.state[name]) for name in first.state)
    ]
    if different:
        names = [repr(short(place.prefix)) for place in (first, *different)]
        raise ConfigError(
            f"{where} contains several networks that fit the backbone, and none of them is preferred: set {key} to one "
            f"of {', '.join(names)}"
        )
    return first


def _check_dtypes(place: Place, own: dict[str, Tensor], where: str) -> None:
    """Raise ConfigError if weights are integers, boolean or complex: their values are no weights of the network."""
    wrong = {
        name: value.dtype
        for name, value in place.state.items()
        if own[name].is_floating_point() and not value.is_floating_point()
    }
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise ConfigError(
            f"{where} contains {len(wrong)} tensors that are no floating-point numbers, such as "
            f"{short(place.prefix + name)} with the dtype {str(dtype).removeprefix('torch.')}: give the file from "
            "before its weights were quantized or converted"
        )


def _found(place: Place, fitting: list[Place], flat: Flat, number: int, net: nn.Module) -> Found:
    """Return the weights at `place` in the flattened checkpoint `flat`, which has `number` tensors as stored."""
    own, notes = names_of(net), list(place.notes)
    state = {name: value.to(own[name].dtype) for name, value in place.state.items()}
    changed = {value.dtype for name, value in place.state.items() if value.dtype != state[name].dtype}
    notes += [f"converted from {dtype}" for dtype in sorted(str(dtype).removeprefix("torch.") for dtype in changed)]
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    notes += [f"{len(broken)} tensors are not finite, such as {short(broken[0])}"] if broken else []
    notes += _doubts(place, net)
    dropped = groups(
        (key for key in flat if not key.startswith(place.prefix) or key[len(place.prefix) :] not in place.state),
        place.prefix,
    )
    others = tuple(other.prefix for other in fitting if other is not place)
    whole = net.state_dict()
    rest = {name: value for name, value in whole.items() if is_noise_state(name) or not isinstance(value, Tensor)}
    return Found(
        rest | wrapped(net, state), place.prefix, number - sum(dropped.values()), dropped, others, tuple(notes)
    )


def _doubts(place: Place, net: nn.Module) -> list[str]:
    """Return notes about differences between published networks that the shapes of their weights do not show."""
    token = place.state.get("cls_token")
    is_small = token is not None and token.shape[-1] == MOCO_V3_SMALL["width"]
    heads = {part.num_heads for part in net.modules() if isinstance(part, Attention)}
    if "base_encoder" in place.prefix and is_small and heads - {MOCO_V3_SMALL["num_heads"]}:
        return ["MoCo v3's own ViT-S has 12 heads, which needs backbone.num_heads=12"]
    return []


def _refusal(
    best: Place | None, flat: Flat, own: dict[str, Tensor], prefix: str | None, where: str, key: str
) -> ConfigError:
    """Return the error of a checkpoint that does not fit. `best` is the place with the most tensors that fit."""
    hint = suggested_backbone(flat)
    if best is None:
        if prefix is not None and not (prefix == "" and hint):  # sources of a single network state the prefix ""
            known = {place.prefix for layout in LAYOUTS for place in places(layout(flat) or {}, own) if place.fits}
            names = ", ".join(repr(short(each)) for each in sorted(known, key=lambda found: (rank(found), found)))
            offer = f"these fit: {names}" if known else "no other prefix fits either"
            return ConfigError(f"{key} is {short(prefix)!r}, but {where} has no weights of the backbone there; {offer}")
        starts = first_keys(list(flat))
        return ConfigError(
            f"{where} does not fit this net: it has no key of the backbone, and its keys are {starts}, ... "
            f"{f'Perhaps {hint}' if hint else 'docs/weights.md lists the layouts of keys that are read'}"
        )
    here = f"with the prefix {short(best.prefix)!r}, " if best.prefix else ""
    return ConfigError(
        f"{where} does not fit this net, and a net with other weights would be measured in its place: {here}"
        f"{len(best.missing)} keys are missing ({first_keys(best.missing)}), "
        f"{len(best.unknown)} are unknown ({first_keys(best.unknown)}), "
        f"{len(best.shapes)} differ in shape ({'; '.join(best.shapes[:3]) or '-'}). "
        f"{hint[0].upper() + hint[1:] if hint else 'Give the backbone it belongs to'}"
    )
