"""k-NN evaluation during training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from small_runs import make_folder
from sslcli.data.sources.files import Folder
from sslcli.errors import ConfigError
from sslcli.evaluation.online import collect


def test_a_split_whose_images_have_become_unreadable_is_named(tmp_path: Path) -> None:
    source = Folder(root=make_folder(tmp_path, per_class=4, broken=0), image_size=8, val_fraction=0.5)
    for position in source.splits["val"].tolist():
        Path(source.path(position)).write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"none of the 4 images of val can be read.* repair or remove them"):
        collect(
            lambda images: images.flatten(1),
            source,
            {"train": source.splits["train"], "val": source.splits["val"]},
            prepare=lambda images: images,
            batch_size=4,
            device=torch.device("cpu"),
            precision="fp32",
        )
