"""Detection of image and label columns."""

from __future__ import annotations

import pytest

from sslcli.data.sources.columns import Column, image_column, label_column
from sslcli.errors import ConfigError


def test_columns_are_found_where_there_is_no_doubt() -> None:
    plain, image = Column(), Column(image=True)
    assert image_column({"id": plain, "photo": image}, "auto", where="x") == "photo"
    assert label_column({"photo": image, "kind": Column(classes=("a",))}, "auto", where="x") == "kind"
    assert label_column({"photo": image, "kind": Column(classes=("a",)), "cls": plain}, "auto", where="x") == "cls"
    assert label_column({"photo": image}, "auto", where="x") is None
    with pytest.raises(ConfigError, match=r"x has several image columns \(a, b\): choose one"):
        image_column({"a": image, "b": image}, "auto", where="x")
    with pytest.raises(ConfigError, match="x has no column that is known to be images: choose one"):
        image_column({"a": plain}, "auto", where="x")
    with pytest.raises(ConfigError, match=r"several .*fine or coarse, or to null"):
        label_column({"fine": Column(classes=("a",)), "coarse": Column(classes=("b",))}, "auto", where="x")
