"""Default number of image channels, and default mean and standard deviation for each number of channels."""

from __future__ import annotations

from typing import Any

# Default of `dataset.channels`, and defaults of `dataset.mean` and `dataset.std` for three channels (from ImageNet).
CHANNELS = 3
DEFAULTS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# Default values for one channel. They are derived from ImageNet: the luma of the mean, and the mean of the standard
# deviations.
GRAY = {"mean": [0.459], "std": [0.226]}
OTHER = {"mean": 0.5, "std": 0.25}  # default values of each channel for any other number of channels


def with_channel_statistics(dataset: Any) -> Any:
    """Return the mapping `dataset` of a configuration with one mean and one standard deviation per channel.

    The default values of `mean` and `std` are for three channels. If `channels` is another number, these default values
    are replaced by default values for this number. A `mean` or `std` with other values is not changed.
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
    """Return the mapping `dataset` of a configuration, adapted to the input channels of a pre-trained network.

    `channels` is the number of input channels of the network. If the mapping has the key `channels` with the default
    value 3, the value is replaced by the argument `channels`, and default values of `mean` and `std` are adapted.
    Otherwise, the mapping is returned unchanged.
    """
    if dataset.get("channels") != CHANNELS or channels == CHANNELS:
        return dataset
    return dict(with_channel_statistics(dataset | {"channels": channels}))
