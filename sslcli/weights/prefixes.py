"""Search for a network in a checkpoint: the prefixes under which all keys of the network occur, best first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

# Parts of prefixes, and the rank of the networks that they name. The first pattern that matches decides; the lowest
# rank is best. Online networks and queries come before their momentum copies, but teachers before students, because
# these are the networks that the methods' papers evaluate.
RANKS = (
    (r"encoder_q|query|online", 0),
    (r"teacher|target_encoder|ema", 2),
    (r"student", 5),
    (r"momentum|encoder_k|key|target", 6),
    (r"base_encoder", 1),
    (r"backbone|encoder", 3),
)
OTHER_RANK = 4
PARTS_OF_BACKBONES = frozenset(
    (
        *("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "stem", "stages", "features", "downsample_layers"),
        *("patch_embed", "cls_token", "dist_token", "reg_token", "pos_embed", "rel_pos_bias", "blocks", "layers"),
        *("norm", "norm_pre", "fc_norm", "ls1", "ls2"),
    )
)


def counts_of_prefixes(keys: Iterable[str], wanted: Collection[str]) -> Counter[str]:
    """Return every prefix in `keys` that precedes a name of `wanted`, with the number of these names.

    A prefix is "" or ends with a dot. For example, the key `module.conv1.weight` has the prefix `module.` of the name
    `conv1.weight`.
    """
    counts: Counter[str] = Counter()
    for key in keys:
        start = 0
        while True:
            if key[start:] in wanted:
                counts[key[:start]] += 1
            start = key.find(".", start) + 1
            if not start:
                break
    return counts


def rank(prefix: str) -> int:
    """Return the rank of the network under `prefix`, see `RANKS`. The lowest rank is best."""
    for pattern, found in RANKS:
        if re.search(rf"(^|[._])({pattern})([._]|$)", prefix):
            return found
    return OTHER_RANK


def matches(prefix: str, wanted: str) -> bool:
    """Return True if the prefix that a user gave, `wanted`, means `prefix`.

    The names of the outer dictionaries may be omitted: `module.encoder_q` means `state_dict.module.encoder_q.`.
    """
    whole = f"{wanted.rstrip('.')}." if wanted else ""
    return prefix == whole or (whole != "" and prefix.endswith(f".{whole}"))


def groups(keys: Iterable[str], prefix: str) -> dict[str, int]:
    """Return the number of keys of each group, for the keys that were not taken from the network under `prefix`.

    The keys beside the network are grouped by the first name after the prefix, such as `fc.*`. All other keys are
    grouped by their start up to the first name that differs from the prefix, such as `state_dict.module.encoder_k.*`.
    """
    own = prefix.split(".")[:-1]
    found: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        same = 0
        while same < min(len(own), len(parts) - 1) and own[same] == parts[same]:
            same += 1
        shown = parts[same : same + 1] if same == len(own) else parts[: same + 1]
        is_whole = len(parts) == same + 1
        found[".".join(shown) + ("" if is_whole else ".*")] += 1
    return dict(found)
