"""Means of scalars since the last log."""

from __future__ import annotations

import torch

from sslcli.engine.metric_means import MetricMeans


def test_a_window_goes_on_in_the_middle_of_a_line() -> None:
    whole, half, rest = MetricMeans(), MetricMeans(), MetricMeans()
    values = [{"loss": torch.tensor(float(value))} for value in (1, 2, 6)]
    for step, scalars in enumerate(values):
        whole.add(step, scalars)
    for step in (0, 1):
        half.add(step, values[step])
    rest.load_state_dict(half.state_dict())
    rest.add(2, values[2])
    assert rest.means() == whole.means() == {"loss": 3.0}
    assert rest.count == 0


def test_a_window_of_other_processes_goes_on_from_their_mean() -> None:
    parts = [MetricMeans(), MetricMeans()]
    for part, value in zip(parts, (1.0, 3.0), strict=True):
        part.add(1, {"loss": torch.tensor(value)})
    merged = MetricMeans()
    merged.load_mean([part.state_dict() for part in parts])
    merged.add(2, {"loss": torch.tensor(5.0)})
    assert merged.means() == {"loss": 3.5}


def test_a_window_does_not_change_the_scalars_it_is_given() -> None:
    window, scalars = MetricMeans(), {"loss": torch.tensor(1.0)}
    window.add(1, scalars)
    window.add(2, scalars)
    assert scalars["loss"] == 1
