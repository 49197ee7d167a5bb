"""Means of the scalars of a method over steps and processes, without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sslcli.distributed import collectives


class MetricMeans:
    """Means of the scalars over the steps since the last log.

    The sums of the scalars stay on the device, so adding a step needs no host synchronization.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.first_bad: Tensor | None = None  # scalar tensor: the first step with a loss that is not finite, or -1

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        finite = torch.isfinite(scalars["loss"])
        before = self.first_bad if self.first_bad is not None else torch.full_like(finite, -1, dtype=torch.long)
        self.first_bad = torch.where(finite | (before >= 0), before, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the scalars of this process since the last log, and the number of steps in the sums.

        The tensors are on the CPU, because they are sent to processes that use other devices.
        """
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]

    def load_mean(self, states: list[dict[str, Any]]) -> None:
        """Load `states`, one per process of a run that had a different number of processes.

        Each state contains the sums of scalars that `state_dict` returned. Each process now gets the mean of these
        sums. The next logged means therefore do not change.
        """
        self.count = states[0]["count"]
        self.sums = {name: torch.stack([state["sums"][name] for state in states]).mean(0) for name in states[0]["sums"]}

    def bad_step(self) -> tuple[int, str]:
        """Return the first step with a non-finite loss on any process, and the scalar means of that process as text.

        Each mean is over the steps since the last call of `means`. If all losses are finite, return -1 and "".
        """
        if self.first_bad is None:  # before the first step, on all processes
            return -1, ""
        steps = collectives.all_gather(self.first_bad[None]).tolist()
        if max(steps) < 0:
            return -1, ""
        text = ", ".join(f"{name} {float(value) / self.count:g}" for name, value in self.sums.items())
        texts = collectives.gather_objects(text)
        return min((step, text) for step, text in zip(steps, texts, strict=True) if step >= 0)

    def means(self) -> dict[str, float]:
        """Return the mean of each scalar over steps and processes, and reset the sums to zero."""
        names = sorted(self.sums)
        values = collectives.all_reduce_mean(torch.stack([self.sums[name].float() for name in names]) / self.count)
        self.sums, self.count = {}, 0
        return dict(zip(names, values.tolist(), strict=True))
