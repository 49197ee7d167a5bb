from __future__ import annotations

import pytest

from sslcli.engine.knn_drop import KnnDrop


@pytest.mark.parametrize("name", ["knn_top1", "test_knn_top1"])
def test_a_drop_by_more_than_five_points_is_told_once_with_numbers_and_remedies(name: str) -> None:
    drop = KnnDrop()
    said = [drop.warning(step, {name: value}) for step, value in enumerate((0.8, 0.9, 0.7501, 0.7, 0.6))]
    assert said[:3] + said[4:] == [None] * 4
    assert said[3] is not None
    assert "fell from 80.0 % at step 0, with the weights of init, to 70.0 % at step 3:" in said[3]
    assert all(key in said[3] for key in ("optimizer.lr", "train.warmup_epochs", "train.freeze_backbone_epochs=1"))


def test_without_a_measurement_at_step_0_nothing_is_told() -> None:
    assert KnnDrop().warning(5, {"knn_top1": 0.0}) is None
