"""ssl-embed and sslcli.embed: files, resumption after a kill, unreadable images, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sslcli
from command_line import Cli
from small_runs import make_folder
from sslcli.errors import EXIT_STOPPED, ConfigError
from sslcli.runs import embed as command
from sslcli.runs import embedding_parts

SLOWLY = """
import sys
from sslcli.cli.embed import main
from sslcli.runs import embedding_parts
embedding_parts.MAX_SECONDS = 0.0  # a part for each batch
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", per_class=60, broken=2)


def test_a_killed_command_is_continued_to_the_same_bits(run_dir: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    line = [f"run={run_dir}", f"images={folder}", "batch_size=1", "workers=0"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *line, "out=killed.npy"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    parts, until = tmp_path / "killed.npy.parts", time.monotonic() + 200
    while len(list(parts.glob("*.npz"))) < 4:
        assert process.poll() is None, "the command ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed.npy").exists()
    ended = cli("ssl-embed", *line, "out=killed.npy")
    assert ended.code == 0
    assert "resuming after" in ended.out
    assert "2 of 120 images cannot be read: see" in ended.out
    assert cli("ssl-embed", *line, "out=whole.npy").code == 0
    for extension in (".npy", ".npy.csv", ".npy.json", ".npy.unreadable.txt"):
        assert (tmp_path / f"killed{extension}").read_bytes() == (tmp_path / f"whole{extension}").read_bytes()
    assert len((tmp_path / "killed.npy.unreadable.txt").read_text().splitlines()) == 2
    assert np.load(tmp_path / "killed.npy").shape[0] == 118
    assert not parts.exists()


def test_a_signal_saves_the_features_so_far(
    run_dir: Path, folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [f"run={run_dir}", f"images={folder}", "batch_size=8", "workers=0", "out=x.npy"]
    add = embedding_parts.Parts.add

    def add_and_stop(parts: embedding_parts.Parts, batch: embedding_parts.EmbeddedBatch) -> None:
        add(parts, batch)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(embedding_parts.Parts, "add", add_and_stop)
    ended = cli("ssl-embed", *line)
    assert (ended.code, "run the same command again" in ended.err) == (EXIT_STOPPED, True)
    monkeypatch.setattr(embedding_parts.Parts, "add", add)
    ended = cli("ssl-embed", *line)
    assert (ended.code, "resuming after 8 of 120" in ended.out) == (0, True)


def test_finished_features_are_kept(run_dir: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    line = [f"run={run_dir}", f"images={folder}/b", "workers=0", "out=x.npy"]
    assert cli("ssl-embed", *line).code == 0
    before = (tmp_path / "x.npy").stat().st_mtime_ns
    (tmp_path / "x.npy.parts").mkdir()  # as after a kill before the last parts were removed
    ended = cli("ssl-embed", *line)
    assert (ended.code, "complete already" in ended.out) == (0, True)
    assert (tmp_path / "x.npy").stat().st_mtime_ns == before
    assert not (tmp_path / "x.npy.parts").exists()
    ended = cli("ssl-embed", *line, "batch_size=7")
    assert (ended.code, "exists with other features" in ended.err) == (2, True)


def test_python_returns_what_the_command_writes(run_dir: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    settings = torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.random.get_rng_state().sum()
    found = sslcli.embed(run_dir, folder, batch_size=16, workers=0)
    assert settings == (
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        torch.random.get_rng_state().sum(),
    )
    line = [f"run={run_dir}", f"images=[{folder}]", "batch_size=16", "workers=0"]
    assert cli("ssl-embed", *line, "out=x.npy").code == 0
    assert np.array_equal(np.load(tmp_path / "x.npy"), found.features.numpy())
    assert (
        json.loads((tmp_path / "x.npy.json").read_text())["checkpoint_sha256"] == found.provenance["checkpoint_sha256"]
    )
    assert (len(found.paths), len(found.unreadable)) == (118, 2)
    some = sslcli.embed(run_dir, [found.paths[5], tmp_path / "none.png", found.paths[3]], workers=0)
    assert some.paths == [found.paths[5], found.paths[3]]
    assert list(some.unreadable) == [str(tmp_path / "none.png")]


def test_images_that_cannot_be_read_are_refused_if_there_are_no_others(run_dir: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.png").touch()
    ended = cli("ssl-embed", f"run={run_dir}", "images=a.png", "workers=0", "out=x.npy")
    assert (ended.code, "none of the 1 images can be read" in ended.err) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]
    with pytest.raises(ConfigError, match="none of the 1 images"):
        sslcli.embed(run_dir, tmp_path / "a.png", workers=0)


def test_outputs_that_cannot_be_written_are_refused_before_the_network_is_loaded(
    run_dir: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "prepare", None)
    (tmp_path / "file").touch()
    (tmp_path / "folder.npy").mkdir()
    for out, message in (
        ("x.txt", "must end in"),
        ("file/x.npy", "its folder cannot be created"),
        ("folder.npy", "that is a directory"),
        (f"{'n' * 237}.npy", "its file name must have at most 240 bytes: choose a shorter name"),
        (f"{'n' * 300}.npy", "its file name must have at most 240 bytes: choose a shorter name"),
    ):
        ended = cli("ssl-embed", f"run={run_dir}", f"out={out}")
        assert (ended.code, message in ended.err) == (2, True)


def test_the_longest_allowed_name_can_be_written(run_dir: Path, folder: Path, tmp_path: Path, cli: Cli) -> None:
    out = "n" * (255 - command.LONGEST_ENDING - 4) + ".npy"
    assert cli("ssl-embed", f"run={run_dir}", f"images={folder}/a", "workers=0", f"out={out}").code == 0
    assert (tmp_path / f"{out}.unreadable.txt").exists()


@pytest.mark.parametrize("images", [None, 3, b"a.png", {"a.png": 1}, [None], [b"a.png"], [], [""], "", "none.png"])
def test_images_that_are_no_paths_are_refused(run_dir: Path, images: Any) -> None:
    with pytest.raises(ConfigError, match=r"^images is "):
        sslcli.embed(run_dir, images)


def test_folders_and_layers_that_cannot_be_used_raise_the_documented_error(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no images in"):
        sslcli.embed(run_dir, tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="feature_layer is 'none', which this net does not have"):
        sslcli.embed(run_dir, tmp_path, feature_layer="none")
    with pytest.raises(ConfigError, match="batch_size is '8', but it must be an integer"):
        sslcli.embed(run_dir, tmp_path, batch_size="8")  # type: ignore[arg-type]
