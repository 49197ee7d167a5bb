"""Messages about keys: the path, the nearest name, all known names, and the remedy."""

from __future__ import annotations

import pytest

from sslcli.config.messages import missing_message, unknown_message


@pytest.mark.parametrize(
    ("where", "key", "known", "expected"),
    [
        (
            "train",
            "epoch",
            ["epochs", "accumulate"],
            "train.epoch: there is no such key. Did you mean 'epochs'? Known keys in train: accumulate, epochs",
        ),
        ("", "sed", ["seed"], "sed: there is no such key. Did you mean 'seed'? Known keys: seed"),
        ("method", "zzz", [], "method.zzz: there is no such key. Known keys in method: none"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_all_known(
    where: str, key: str, known: list[str], expected: str
) -> None:
    assert unknown_message(where, key, known) == expected


def test_a_missing_key_is_named_with_the_way_to_set_it() -> None:
    assert missing_message("method", ["dim", "hidden"]) == "method lacks dim, hidden: set it with method.dim=..."
    assert missing_message("", ["run"]) == "the configuration lacks run: set it with run=..."
