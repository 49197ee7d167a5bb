import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslcli.data.bad_images import BadImage, BadImages, TooManyBadImages
from sslcli.data.sources.base import Source, replacement
from sslcli.data.sources.files import Flat


def photo(path: Path, *, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 60).convert("RGB").save(path)
    return path


def read_alone(path: Path) -> Image.Image:
    source = Flat(root=str(path.parent), image_size=8)
    return source.read([source.path(i) for i in range(len(source))].index(str(path)))


def test_truncated_jpeg_is_bad(tmp_path):
    path = photo(tmp_path / "a.jpg")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImage, match=r"a\.jpg.*truncated"):
        read_alone(path)


def test_truncated_png_is_bad(tmp_path):
    path = photo(tmp_path / "a.png")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadImage, match=r"a\.png"):
        read_alone(path)


def test_html_named_jpg_is_bad(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_text("<html><body>404</body></html>")
    with pytest.raises(BadImage, match="no known image format"):
        read_alone(path)


def test_empty_file_is_bad(tmp_path):
    path = tmp_path / "a.jpg"
    path.touch()
    with pytest.raises(BadImage, match="the file is empty"):
        read_alone(path)


def test_broken_link_is_listed_and_bad(tmp_path):
    path = tmp_path / "a.jpg"
    path.symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(BadImage, match="No such file"):
        read_alone(path)


def test_file_without_permission_is_bad(tmp_path, monkeypatch):
    path = photo(tmp_path / "a.jpg")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadImage, match="Permission denied"):
        read_alone(path)


def outcome_as_nobody(path: str, answer) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        source = Flat(root=path, image_size=8)
        source.read(0)
        answer.put(("read", ""))
    except (BadImage, ValueError) as error:
        answer.put((type(error).__name__, str(error)))


def as_nobody(path: Path) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=outcome_as_nobody, args=(str(path), answer))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    return answer.get()


@pytest.fixture
def open_to_all():
    """A folder that any user reaches; the parents of tmp_path are closed to others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_another_user_reads_an_open_file_and_is_refused_a_closed_one(open_to_all):
    path = photo(open_to_all / "set" / "a.jpg")
    path.chmod(0o644)
    assert as_nobody(path.parent) == ("read", "")
    path.chmod(0o000)
    kind, text = as_nobody(path.parent)
    assert kind == "BadImage"
    assert "a.jpg: Permission denied" in text


def test_folder_that_cannot_be_listed_is_an_error_that_names_it(open_to_all):
    path = photo(open_to_all / "set" / "inner" / "a.jpg")
    path.parent.chmod(0o000)
    kind, text = as_nobody(path.parent.parent)
    path.parent.chmod(0o755)
    assert kind == "ValueError"
    assert str(path.parent) in text
    assert "Permission denied" in text


def test_files_of_a_folder_that_can_be_listed_but_not_entered_are_bad(open_to_all):
    path = photo(open_to_all / "set" / "inner" / "a.jpg")
    path.parent.chmod(0o644)
    kind, text = as_nobody(path.parent.parent)
    path.parent.chmod(0o755)
    assert kind == "BadImage"
    assert "a.jpg: Permission denied" in text


def test_bad_image_crosses_a_process_border_whole():
    error = pickle.loads(pickle.dumps(BadImage("a/b.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a/b.jpg", "truncated", "a/b.jpg: truncated")


def test_check_is_quiet_up_to_the_share_and_raises_above_it():
    bad = BadImages(max_bad=0.02, total=100)
    for name in ("a", "b", "a"):
        bad.add(name, "truncated")
        bad.check()
    assert bad.count == 2
    bad.add("c", "empty")
    with pytest.raises(TooManyBadImages, match=r"3 of 100 .*max_bad=0\.02 allows 2") as caught:
        bad.check()
    assert isinstance(caught.value, ValueError)
    assert "a: truncated" in str(caught.value)
    assert "c: empty" in str(caught.value)


def test_max_bad_zero_stops_at_the_first():
    bad = BadImages(max_bad=0, total=10)
    bad.check()
    bad.add("a", "truncated")
    with pytest.raises(TooManyBadImages):
        bad.check()


def test_message_lists_twenty_paths_and_the_total():
    bad = BadImages(max_bad=0, total=100)
    for number in range(25):
        bad.add(f"image{number:02}.jpg", "truncated")
    with pytest.raises(TooManyBadImages) as caught:
        bad.check()
    text = str(caught.value)
    assert text.count(".jpg: truncated") == 20
    assert "image19.jpg" in text
    assert "image20.jpg" not in text
    assert "5 more" in text


def test_control_characters_in_a_path_are_escapes(tmp_path):
    bad = BadImages(max_bad=0, total=1)
    bad.add("a\n\x1b[31m.jpg", "empty")
    bad.write(tmp_path / "bad.txt")
    assert (tmp_path / "bad.txt").read_bytes() == b"a\\n\\x1b[31m.jpg\tempty\n"
    with pytest.raises(TooManyBadImages, match=r"a\\n\\x1b\[31m.jpg: empty"):
        bad.check()


def test_write_gives_one_line_a_path(tmp_path):
    bad = BadImages(max_bad=1, total=2)
    bad.add("b.jpg", "two\nlines\tand a tab")
    bad.add(os.fsdecode(b"a\xff.jpg"), "empty")
    bad.write(tmp_path / "bad.txt")
    assert (tmp_path / "bad.txt").read_bytes() == b"a\xff.jpg\tempty\nb.jpg\ttwo lines and a tab\n"


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_share_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match="max_bad"):
        BadImages(max_bad=fraction, total=10)
    with pytest.raises(ValueError, match="max_bad"):
        Numbered(4, max_bad=fraction)


class Numbered(Source):
    """n labeled images of which nothing is read."""

    name = "numbered"

    def __init__(self, n: int, **keywords):
        super().__init__(image_size=8, **keywords)
        self.labels = torch.zeros(n, dtype=torch.int64)
        self.split(torch.arange(n), labeled=self.labels == 0)


def test_replacement_is_deterministic_another_training_position():
    source = Numbered(44, val_fraction=0.5)
    train = set(source.splits["train"].tolist())
    for position in range(44):
        picks = [replacement(source, position, attempt) for attempt in range(1, 30)]
        assert picks == [replacement(source, position, attempt) for attempt in range(1, 30)]
        assert set(picks) <= train - {position}
        assert len(set(picks)) > 5


def test_replacement_of_the_only_image_is_refused():
    source = Numbered(1)
    with pytest.raises(ValueError, match="only training image"):
        replacement(source, int(source.splits["train"][0]), 1)


def test_replacement_of_one_of_two_is_the_other():
    source = Numbered(2)
    assert {replacement(source, 0, attempt) for attempt in range(10)} == {1}
