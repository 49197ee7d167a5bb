"""Old names of modules, classes, choices and keys."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from sslcli.config import moved
from sslcli.config.moved import (
    CHOICES,
    DEFAULTS,
    KEYS,
    MODULES,
    current_config,
    current_override,
    current_target,
    forced_override,
)

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("module", sorted(set(MODULES.values()) | set(moved.PACKAGES.values())))
def test_every_new_name_is_a_module_of_today(module: str) -> None:
    assert find_spec(module) is not None


def test_new_names_are_no_old_names() -> None:
    assert not set(MODULES) & set(MODULES.values())
    assert not set(KEYS) & set(KEYS.values())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sslcli.data.files.Folder", "sslcli.data.sources.files.Folder"),
        ("sslcli.data.views.Views", "sslcli.data.views.views.Views"),
        ("sslcli.evaluate.knn.Knn", "sslcli.evaluation.knn.Knn"),
        ("sslcli.methods.moco.MoCo", "sslcli.methods.moco.MoCo"),
        ("torch.optim.SGD", "torch.optim.SGD"),
        ("Folder", "Folder"),
    ],
)
def test_a_class_has_the_name_of_its_new_module(old: str, new: str) -> None:
    assert current_target(old) == new
    assert current_target(new) == new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("views=mocov2", "views=moco_v2"),
        ("views=mocov1,mocov2,simclr", "views=moco_v1,moco_v2,simclr"),
        ("views@other=mocov2", "views@other=moco_v2"),
        ("monitor.knn_every=5", "monitor.knn_every_epochs=5"),
        ("+monitor.health_every=5", "+monitor.health_every_steps=5"),
        ("~train.log_every", "~train.log_every_steps"),
        ("name=mocov2", "name=mocov2"),
        ("train.epochs=3", "train.epochs=3"),
        ("run_dir=/a=b", "run_dir=/a=b"),
    ],
)
def test_an_override_gets_the_names_of_today(old: str, new: str) -> None:
    assert current_override(old) == new
    assert current_override(new) == new


@pytest.mark.parametrize("group", CHOICES)
def test_old_choices_are_yaml_files_that_choose_the_new_ones(group: str) -> None:
    for old, new in CHOICES[group].items():
        assert new in (moved.FOLDER / group / f"{old}.yaml").read_text("utf-8")
        assert (CONF / group / f"{new}.yaml").exists()
        assert not (CONF / group / f"{old}.yaml").exists()


def test_a_configuration_is_renamed_in_depth_with_a_note_for_each_old_name() -> None:
    config = {
        "dataset": {"_target_": "sslcli.data.parallel.Parallel", "unlabelled": "x"},
        "method": {"_target_": "mine.Method", "parts": [{"_target_": "sslcli.mixture.Mixture", "seed": 1}]},
        "train": {"log_every": 3, "epochs": 1},
    }
    renamed, notes = current_config(config)
    assert renamed == {
        "dataset": {"_target_": "sslcli.data.sources.parallel.Parallel", "unlabeled": "x"},
        "method": {"_target_": "mine.Method", "parts": [{"_target_": "sslcli.methods.mixture.Mixture", "seed": 1}]},
        "train": {"log_every_steps": 3, "epochs": 1},
    }
    assert len(notes) == 4
    assert "train.log_every is now train.log_every_steps" in notes
    assert config["train"] == {"log_every": 3, "epochs": 1}  # the argument is unchanged
    assert current_config(renamed) == (renamed, [])


def test_a_key_of_the_command_line_has_precedence_over_an_old_key_of_a_yaml() -> None:
    config = {"train": {"log_every": 3, "log_every_steps": 10}}
    assert current_config(config)[0] == {"train": {"log_every_steps": 3}}
    assert current_config(config, overridden=["train.log_every_steps"])[0] == {"train": {"log_every_steps": 10}}


IMPORTS = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sslcli.losses import mutual_info_nce
    import sslcli.noise
    from sslcli.nn.contrastive import nt_xent_symmetric
assert mutual_info_nce is nt_xent_symmetric
assert sslcli.noise.__name__ == "sslcli.nn.noise"
messages = [str(each.message) for each in caught if each.category is DeprecationWarning]
assert "sslcli.losses is now sslcli.nn.contrastive" in messages, messages
"""


def test_old_imports_give_the_new_modules_and_functions_with_a_warning() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


def test_an_old_module_runs_as_a_program() -> None:
    assert moved.MovedModules().get_code("sslcli.slurm.queue") is not None
    assert moved.MovedModules().find_spec("sslcli.nonesuch", None) is None


def test_a_new_key_with_another_value_than_its_default_wins_over_the_old_key() -> None:
    assert current_config({"monitor": {"knn_every": 3, "knn_every_epochs": 1}})[0] == {
        "monitor": {"knn_every_epochs": 3}
    }
    assert current_config({"monitor": {"knn_every": 3, "knn_every_epochs": 9}})[0] == {
        "monitor": {"knn_every_epochs": 9}
    }


def test_the_defaults_of_renamed_keys_are_those_of_the_yaml_files() -> None:
    conf = CONF
    assert set(DEFAULTS) == set(KEYS.values())
    found = {"monitor": yaml.safe_load((conf / "monitor/default.yaml").read_text())}
    found |= {"train": yaml.safe_load((conf / "train.yaml").read_text())["train"]}
    found |= {"dataset": yaml.safe_load((conf / "dataset/cifar10.yaml").read_text())}
    for key, value in DEFAULTS.items():
        group, _, name = key.partition(".")
        assert found[group][name] == value


def test_a_choice_of_the_user_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    (tmp_path / "views/mocov2.yaml").write_text("normalize: true\n")
    assert current_override("views=mocov2", own_folder=tmp_path) == "views=mocov2"
    assert current_override("views=mocov1,mocov2", own_folder=tmp_path) == "views=moco_v1,mocov2"


def test_an_override_of_a_renamed_key_is_forced() -> None:
    assert forced_override("monitor.knn_every_epochs=3") == "++monitor.knn_every_epochs=3"
    assert forced_override("~monitor.knn_every_epochs") == "~monitor.knn_every_epochs"
    assert forced_override("seed=3") == "seed=3"
