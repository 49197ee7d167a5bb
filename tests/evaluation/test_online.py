"""k-NN evaluation during training."""

from __future__ import annotations

import torch
from torch import Tensor

from sslcli.data.sources.base import Source
from sslcli.evaluation.online import unanswerable


def test_only_images_with_a_label_count() -> None:
    source = Source(image_size=8)
    source.labels, source.classes = torch.tensor([0, 1, -1, 2, 2, 3, -1]), list("abcd")

    def warning_of(bank: list[int], queries: list[int]) -> str | None:
        return unanswerable(source, positions(bank), positions(queries))

    def positions(rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64)

    assert warning_of([0, 1], [0, 1, 6]) is None
    assert "3 of 4 have classes" in str(warning_of([0, 1, 2], [0, 3, 4, 5, 6]))
    assert str(warning_of([0, 1, 2], [0, 3, 4, 5, 6])).endswith(": c, d")
