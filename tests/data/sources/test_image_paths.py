"""A dataset of given files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sslcli.data.bad_images import BadImage
from sslcli.data.sources.image_paths import ImagePaths


def test_files_keep_their_order_and_folders_are_searched(tmp_path: Path) -> None:
    names = ["z.png", "a.png", "folder/b.png", "folder/inner/c.png", "folder/notes.txt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path) if name.endswith("png") else path.touch()
    source = ImagePaths(paths=[tmp_path / "z.png", tmp_path / "folder", str(tmp_path / "a.png")], image_size=8)
    found = [source.path(position) for position in source.splits["train"].tolist()]
    assert found == [str(tmp_path / name) for name in ("z.png", "folder/b.png", "folder/inner/c.png", "a.png")]
    assert not source.has_labels
    assert source.read(1).size == (8, 8)


def test_an_absent_file_is_unreadable_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="No such file"):
        ImagePaths(paths=[tmp_path / "none.png"], image_size=8).read(0)
    with pytest.raises(ValueError, match="there are no images in"):
        ImagePaths(paths=[tmp_path], image_size=8)
    with pytest.raises(ValueError, match="images is empty"):
        ImagePaths(paths=[], image_size=8)
