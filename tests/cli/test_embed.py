"""The command line of ssl-embed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import Cli
from sslcli.backbones.resnet import ResNet


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "give run=DIR, or weights=FILE"),
        (["run=/none", "out=x.npy"], "there is no such path"),
        (["run=", "out=x.npy"], "run is '', but there is no such path"),
        (["weights=''", "out=x.npy"], "weights is '', but there is no such path"),
        (["run=.", "weights=.", "out=x.npy"], "not both"),
        (["run=."], "out is null: set it to the file to write"),
        (["weights=.", "out=x.npy"], "requires images=... or dataset=..."),
        (["run=.", "images=a", "dataset=shapes", "out=x.npy"], "images and dataset are both set"),
        (["run=.", "images=a", "dataset.limit=2", "out=x.npy"], "images and dataset are both set"),
        (["run=.", "images=a", "split=test", "out=x.npy"], "images=... have no splits"),
        (["run=.", "images=none", "out=x.npy"], "images is '.*none', but there is no such file"),
        (["run=.", "out=x.npy", "split=tset"], "split is 'tset', but it must be one of: all, train, val, test"),
        (["run=.", "out=x.npy", "image=a"], "Did you mean 'images'"),
        (["run=.", "out=x.npy", "images={a: 1}"], "images is .*, but it must be a string or a list of strings or null"),
        (["--multirun", "run=.", "out=x.npy,y.npy"], "ssl-embed does not support --multirun"),
    ],
)
def test_wrong_input_is_refused(cli: Cli, overrides: list[str], message: str) -> None:
    ended = cli("ssl-embed", *overrides)
    assert ended.code == 2
    assert re.search(message, ended.err), ended.err


def test_the_dataset_of_a_run_can_be_changed_or_replaced(run_dir: Path, tmp_path: Path, cli: Cli) -> None:
    line = [f"run={run_dir}", "split=test"]
    assert cli("ssl-embed", *line, "out=own.npy").code == 0
    assert cli("ssl-embed", *line, "dataset.test_images=7", "out=changed.npy").code == 0
    other = ["dataset=shapes", "dataset.limit=200", "dataset.test_images=100"]
    assert cli("ssl-embed", *line, *other, "out=same.npy").code == 0
    own, changed, same = (np.load(tmp_path / f"{name}.npy") for name in ("own", "changed", "same"))
    assert (len(own), len(changed)) == (100, 7)
    assert np.array_equal(own, same)
    assert (tmp_path / "own.npy.csv").read_text().splitlines()[1].endswith(",test")


def test_the_backbone_of_a_weight_file_needs_no_dataset(tmp_path: Path, cli: Cli) -> None:
    net = ResNet("resnet18", image_size=224, stem="imagenet")
    torch.save(net.state_dict(), "published.pth")
    Image.new("RGB", (48, 40), (9, 99, 30)).save("a.jpg")
    ended = cli("ssl-embed", "weights=published.pth", "backbone=resnet18", "images=a.jpg", "out=x.npy")
    assert ended.code == 0, ended.err
    assert np.load("x.npy").shape == (1, 512)
    ended = cli("ssl-eval", "weights=published.pth", "backbone=resnet18")
    assert (ended.code, "weights=FILE requires dataset=..." in ended.err) == (2, True)
