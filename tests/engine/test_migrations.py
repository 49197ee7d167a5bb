"""Migration of checkpoints of older versions."""

from __future__ import annotations

from typing import Any

from sslcli.engine.migrations import SCHEMA, STEPS, upgrade


def first_version() -> dict[str, Any]:
    """A state as the first version saved it."""
    return {
        "method": {"weight": 1.0},
        "watch": {"wall": 5.0, "judge": {"alarms": 2}},
        "processes": [{"rng": b"0", "window": [1]}, {"rng": b"1", "window": [2]}],
        "config": {"train": {"log_every": 3}, "method": {"_target_": "sslcli.mixture.UnMix"}},
    }


def test_there_is_a_step_from_every_version_to_the_next() -> None:
    assert list(STEPS) == list(range(1, SCHEMA))


def test_a_state_of_the_first_version_has_the_fields_of_today() -> None:
    found = upgrade(first_version())
    assert found == {
        "schema": SCHEMA,
        "method": {"weight": 1.0},
        "loader": None,
        "environment": {},
        "monitor": {"wall": 5.0, "detector": {"alarms": 2}},
        "processes": [{"rng": b"0", "metric_means": [1]}, {"rng": b"1", "metric_means": [2]}],
        "config": {"train": {"log_every_steps": 3}, "method": {"_target_": "sslcli.methods.mixture.UnMix"}},
    }


def test_compiled_parts_of_the_second_version_have_their_new_names() -> None:
    state = {"schema": 2, "circumstances": {"compiled parts": "change, winograd", "torch": "2.1"}}
    assert upgrade(state)["environment"] == {"compiled parts": "color, winograd", "torch": "2.1"}


def test_weights_without_the_rest_of_a_state_are_converted() -> None:
    found = upgrade({"method": {"weight": 1.0}})
    assert found["schema"] == SCHEMA
    assert "monitor" not in found
    assert "processes" not in found


def test_a_current_state_and_the_argument_are_unchanged() -> None:
    state = {"schema": SCHEMA, "monitor": {}, "environment": {"x": "y"}}
    assert upgrade(state) == state
    old = first_version()
    upgrade(old)
    assert old == first_version()
