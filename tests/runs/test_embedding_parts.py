"""Part files: written while features are computed, and used by the next process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sslcli.errors import ConfigError
from sslcli.runs import embedding_parts
from sslcli.runs.embedding import EmbeddedBatch
from sslcli.runs.embedding_parts import Parts


def batch(start: int, images: int = 2, bad: int = 0) -> EmbeddedBatch:
    positions = np.arange(start, start + images - bad)
    features = np.repeat(positions[:, None], 3, 1).astype(np.float32)
    return EmbeddedBatch(images, positions, features, {f"bad{start + images - 1 - i}": "damaged" for i in range(bad)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three parts of two images each."""
    monkeypatch.setattr(embedding_parts, "MAX_SECONDS", 0.0)
    with Parts(tmp_path / "parts", "one") as parts:
        for start in (0, 2, 4):
            parts.add(batch(start, bad=int(start == 2)))
    return tmp_path / "parts"


def rows(parts: Parts) -> list[int]:
    return [position for part in parts for position in part.positions.tolist()]


def test_parts_are_resumed_with_all_they_contain(folder: Path) -> None:
    with Parts(folder, "one") as parts:
        assert (parts.done, parts.rows, parts.num_features) == (6, 5, 3)
        assert parts.unreadable == {"bad3": "damaged"}
        assert rows(parts) == [0, 1, 2, 4, 5]
        assert [part.features[0, 0] for part in parts] == [0.0, 2.0, 4.0]
    assert len(list(folder.glob("*.npz"))) == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_parts_from_a_damaged_one_on_are_computed_again(folder: Path, damage: str) -> None:
    second = sorted(folder.glob("*.npz"))[1]
    content = second.read_bytes()
    if damage == "remove":
        second.unlink()
    elif damage == "truncate":
        second.write_bytes(content[:-30])
    else:
        place = content.index(np.float32(2).tobytes() * 3)
        second.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    with Parts(folder, "one") as parts:
        assert (parts.done, rows(parts)) == (2, [0, 1])
        assert len(list(folder.glob("*.npz"))) == 1


def test_parts_of_other_features_are_removed(folder: Path) -> None:
    with Parts(folder, "other") as parts:
        assert (parts.done, parts.removed) == (0, 3)
    assert not list(folder.glob("*.npz"))


def test_batches_in_memory_are_written_when_the_block_ends(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Parts(tmp_path / "parts", "one") as parts:  # noqa: PT012
        parts.add(batch(0))
        parts.add(batch(2))
        assert not list(parts.folder.glob("*.npz"))
        raise KeyboardInterrupt
    with Parts(tmp_path / "parts", "one") as parts:
        assert rows(parts) == [0, 1, 2, 3]


def test_large_batches_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_parts, "MAX_BYTES", 40)
    with Parts(tmp_path / "parts", "one") as parts:
        parts.add(batch(0))
        assert not list(parts.folder.glob("*.npz"))
        parts.add(batch(2))
        assert len(list(parts.folder.glob("*.npz"))) == 1


def test_one_process_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with Parts(tmp_path / "parts", "one"), pytest.raises(ConfigError, match="another process writes"):
        Parts(tmp_path / "parts", "one")
    with pytest.raises(ConfigError, match="cannot be created"):
        Parts(tmp_path / "none" / "parts", "one")
