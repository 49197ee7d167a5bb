"""Default run directory and the digest of the overrides that affect the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import composed
from sslcli.config.run_config import RunConfig
from sslcli.errors import ConfigError
from sslcli.runs.identity import default_name, digest_of, result_overrides, run_dir_of

CHOICES = {"method": "moco", "dataset": "cifar10", "backbone": "resnet18", "views": "moco_v2"}


def test_the_name_has_method_data_set_backbone_and_digest() -> None:
    assert default_name(CHOICES, "0a1b2c") == "moco_cifar10_resnet18_0a1b2c"
    assert default_name(CHOICES, "") == "moco_cifar10_resnet18"


def test_the_digest_does_not_depend_on_order_and_has_six_digits() -> None:
    digest = digest_of(["seed=1", "method=moco"])
    assert digest == digest_of(["method=moco", "seed=1"])
    assert len(digest) == 6
    assert int(digest, 16) >= 0
    assert digest != digest_of(["method=moco", "seed=2"])
    assert digest_of([]) == ""


@pytest.mark.parametrize(
    "line",
    [
        *("run_dir=/x", "name=x", "device=cpu", "dry_run=true", "launcher.threads=1", "launcher=multi", "train.keep=9"),
        *("train.max_time=5m", "dataset.workers=1", "++hydra.job.name=x", "hydra/launcher=joblib", "trust=[torch]"),
    ],
)
def test_overrides_that_do_not_affect_the_results_are_left_out(line: str) -> None:
    assert result_overrides([line, "seed=1"]) == ["seed=1"]


@pytest.mark.parametrize("line", ["train.log_every_steps=3", "+method.dim=8", "~experiment", "launchers=1", "named=x"])
def test_other_overrides_are_kept(line: str) -> None:
    assert len(result_overrides([line])) == 1


def test_the_current_and_the_old_name_of_an_override_have_one_digest() -> None:
    """Directories of runs that an older version started are found again."""
    assert digest_of(["views=moco_v2"]) == digest_of(["views=mocov2"])
    assert digest_of(["monitor.knn_every_epochs=2"]) == digest_of(["monitor.knn_every=2"])


def test_the_run_directory_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.from_plain(composed("train"))
    assert run_dir_of(config) == f"{tmp_path}/runs/simclr_shapes_small"
    assert run_dir_of(config.changed(name="mine")) == f"{tmp_path}/runs/mine"
    assert run_dir_of(config.changed(name="group/mine")) == f"{tmp_path}/runs/group/mine"
    assert run_dir_of(config.changed(name="mine", run_dir="a/../b")) == f"{tmp_path}/b"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"name": "a" * 300},
            "name contains the name a+.*, which has 300 bytes, .* at most 255: choose a shorter name",
        ),
        ({"name": "é" * 200}, "which has 400 bytes"),
        ({"name": "../../up"}, "name is '../../up', but it must name a directory below runs/"),
        ({"name": ".."}, r"name is '\.\.'"),
        ({"name": "/mine"}, "name is '/mine'"),
        ({"name": "group//mine"}, "name is 'group//mine'"),
        ({"name": "a\0b"}, r"name is .*a\\x00b', but a path cannot contain the NUL character"),
        ({"run_dir": "a\0b"}, "run_dir is .* the NUL character"),
        ({"run_dir": f"x/{'b' * 256}/y"}, "run_dir contains the name b+.*, which has 256 bytes"),
        ({"run_dir": "/".join(["d" * 200] * 25)}, r"run_dir is d+\.\.\., a path of 5\d+ bytes"),
    ],
)
def test_a_name_that_no_directory_can_have_is_refused(values: dict[str, str], expected: str) -> None:
    config = RunConfig.from_plain(composed("train"))
    with pytest.raises(ConfigError, match=expected):
        run_dir_of(config.changed(**values))


def test_the_longest_possible_name_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.from_plain(composed("train"))
    Path(run_dir_of(config.changed(name="a" * 255))).mkdir(parents=True)
