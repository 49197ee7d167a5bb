"""Initial weights of the backbone (`init=FILE|run:DIR|timm:NAME`): reading, comparison of the processes, and a record.

They are read when a run starts from the beginning. A run with a checkpoint resumes without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslcli.backbones.base import Backbone
from sslcli.config.run_config import RunConfig
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.distributed import collectives
from sslcli.distributed.devices import unchanged_random_state
from sslcli.distributed.shared_work import agreed
from sslcli.engine import checkpoint
from sslcli.errors import ConfigError, class_name
from sslcli.methods.base import Method
from sslcli.report.console import Screen
from sslcli.runs.weights_source import WeightsSource, open_weights
from sslcli.weights.published import find_weights

ROW = "initial weights"  # key in the section `effective` of config.yaml; only runs with `init` have it


@dataclass(frozen=True)
class Weights:
    """Weights that a setting names, and that fit a network.

    Attributes:
        net: the network. The weights are not loaded into it.
        state: state dict of `net`.
        record: where the weights come from, and what was taken and dropped, as plain values for config.yaml.
        summary: one line with the same facts.
        statistics: mean and standard deviation with which the source normalized images, if it states them.
    """

    net: Backbone
    state: dict[str, Any]
    record: dict[str, Any]
    summary: str
    statistics: tuple[Sequence[float], Sequence[float]] | None


def read_weights(
    spec: str, net_for: Callable[[WeightsSource], Backbone], *, prefix: str | None, trust: list[str], setting: str
) -> Weights:
    """Read the weights of the network that `net_for` returns. All processes must call this function.

    `spec` and `prefix` are the values of the settings `setting` and `setting`_prefix, see `open_weights` and
    `find_weights`. The random state is not changed.

    Raises ConfigError on all processes if the weights cannot be read, if they do not fit the network, or if the
    processes read different weights.
    """

    def read() -> Weights:
        source = open_weights(spec, trust=trust)
        net = net_for(source)
        chosen = source.prefix if prefix is None else prefix
        found = find_weights(source.content, net, prefix=chosen, where=source.where, key=f"{setting}_prefix")
        statistics = None if source.mean is None or source.std is None else (source.mean, source.std)
        record = dict(source.provenance) | found.provenance()
        return Weights(net, found.state, record, found.summary(source.where), statistics)

    with unchanged_random_state(torch.device("cpu")):
        weights = agreed(read)
    records = collectives.gather_objects(weights.record)
    if any(record != records[0] for record in records):
        raise ConfigError(
            f"{setting} is {spec}, but the processes read different weights from it: copy the same file to every node"
        )
    return weights


class InitialWeights:
    """Initial weights of the backbone of a run. `load` puts them into the backbone before the method copies it.

    Attributes:
        record: where the weights come from, and what was taken and dropped, as plain values for config.yaml.
        summary: one line with the same facts.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.record: dict[str, Any] = {}
        self.summary = ""
        self.state: dict[str, Any] = {}
        self.statistics: tuple[Sequence[float], Sequence[float]] | None = None  # mean and std of the source, if known

    def load(self, backbone: Backbone) -> None:
        """Read the weights, and load them into `backbone`. All processes must call this method.

        Raises ConfigError on all processes if the weights cannot be read, if they do not fit the backbone, or if the
        processes read different weights.
        """
        init, prefix, trust = str(self.config.init), self.config.init_prefix, self.config.trust
        found = read_weights(init, lambda _: backbone, prefix=prefix, trust=trust, setting="init")
        self.record, self.summary, self.state, self.statistics = (
            found.record,
            found.summary,
            found.state,
            found.statistics,
        )
        backbone.load_state_dict(self.state)
        backbone.pretrained = True

    def check_kept(self, method: Method) -> None:
        """Raise ConfigError if the constructor of `method` replaced the weights. Then forget the weights."""
        own = method.backbone.state_dict()
        lost = [
            name
            for name, value in self.state.items()
            if isinstance(value, Tensor) and name in own and not torch.equal(own[name], value)
        ]
        if lost:
            raise ConfigError(
                f"init is {self.config.init}, but the constructor of {class_name(type(method))} changes {len(lost)} "
                f"tensors of the backbone, such as {lost[0]}: leave the backbone unchanged, or remove init"
            )
        self.state = {}

    def report(self, source: Source, views: Views, screen: Screen) -> None:
        """Print what was taken and dropped. Warn if the run normalizes images unlike the source of the weights."""
        screen.say(f"{ROW}: {self.summary}")
        now = views.statistics(mean=source.mean, std=source.std)
        if self.statistics is not None and rounded(self.statistics) != rounded(now):
            mean, std = rounded(self.statistics)
            own_mean, own_std = rounded(now)
            screen.warn(
                f"the weights of init were trained on images with the mean {mean} and std {std}, but this run uses "
                f"{own_mean} and {own_std} (0 and 1: not normalized), so their features differ at first: set "
                "dataset.mean, dataset.std or views.normalize, or let the training adapt the weights"
            )


def rounded(statistics: tuple[Sequence[float], Sequence[float]]) -> list[list[float]]:
    """Return mean and standard deviation per channel with three decimals, since publications round differently."""
    return [[round(value, 3) for value in values] for values in statistics]


def initial_weights(config: RunConfig) -> InitialWeights | None:
    """Return the initial weights of a run, or None if it has none or resumes from a checkpoint.

    Rank 0 decides if there is a checkpoint. All processes must call this function.
    """
    answer = [config.init is not None and not checkpoint.all_of(config.directory)]
    collectives.broadcast_objects(answer)
    return InitialWeights(config) if answer[0] else None


def record_of(initial: InitialWeights | None, stored: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of the section `effective` of config.yaml that describes the initial weights, or {}.

    `stored` is the content of config.yaml, or {} for a new run. A run that resumes keeps the stored entry.
    """
    if initial is not None:
        return {ROW: initial.record}
    kept = (stored.get("effective") or {}).get(ROW)
    return {} if kept is None else {ROW: kept}


def check_start(config: RunConfig, initial: InitialWeights | None, step: int) -> None:
    """Raise ConfigError if a run with `init` would start from the beginning without its initial weights.

    This happens only if the checkpoints were deleted after `initial_weights` was called.
    """
    if config.init is not None and initial is None and step == 0:
        raise ConfigError(f"{config.directory} had a checkpoint when the run started, but has none now: start again")
