"""Default mean and standard deviation of images that do not have three channels."""

from __future__ import annotations

from typing import Any

# Default of `dataset.channels`, and defaults of `dataset.mean` and `dataset.std` for three channels (from ImageNet).
CHANNELS = 3
DEFAULTS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Gray ImageNet images: the luma of the mean, and the mean standard deviation.
GRAY = {"mean": [0.459], "std": [0.226]}
OTHER = {"mean": 0.5, "std": 0.25}


def with_channel_statistics(dataset: Any) -> Any:
    """Return the node `dataset` of a configuration with one mean and one standard deviation per channel.

    If the node sets a number of channels other than three, the default `mean` and `std` for three channels are replaced
    by defaults for this number. A `mean` or `std` with other values is not changed.
    """
    channels = dataset.get("channels", CHANNELS) if isinstance(dataset, dict) else CHANNELS
    if channels == CHANNELS or isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        return dataset
    found = dict(dataset)
    for key, default in DEFAULTS.items():
        if found.get(key) == default:
            found[key] = list(GRAY[key]) if channels == 1 else [OTHER[key]] * channels
    return found


def with_channels_of(dataset: dict[str, Any], channels: int) -> dict[str, Any]:
    """Return the node `dataset` with the number of channels of a network that was pre-trained on another dataset.

    If the node has the key `channels` with the default value, the value is replaced by `channels`. Otherwise, the node
    is returned unchanged.
    """
    if dataset.get("channels") != CHANNELS or channels == CHANNELS:
        return dataset
    return dict(with_channel_statistics(dataset | {"channels": channels}))
