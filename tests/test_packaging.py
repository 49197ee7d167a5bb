"""What is installed is complete: the wheel works in an empty environment, away from the checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
SHIPPED = ["setup.cfg", "pyproject.toml", "README.md", "LICENSE", "sslcli", "conf"]


def run(*line: str, cwd: Path) -> str:
    """What a command prints; it must end well, and sees no path of ours."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing built earlier gets into it."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        part = ROOT / name
        if part.is_dir():
            shutil.copytree(part, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, copy / name)
    try:
        here = int(version("setuptools").partition(".")[0]) >= 71  # the first that needs no `wheel`
    except PackageNotFoundError:
        here = False
    isolation = ["--no-build-isolation"] if here else []
    run(sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", *isolation, "--wheel-dir", str(out), cwd=out)
    (found,) = out.glob("sslcli-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that holds the wheel, and borrows what it depends on."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    python = home / "bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel), cwd=home)
    (packages,) = home.glob("lib/python*/site-packages")
    # The .pth files in there are not followed, and so neither is an editable installation.
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(str(python), "-c", "import sslcli; print(sslcli.__file__)", cwd=home).strip()
    assert Path(where).is_relative_to(packages)
    return home / "bin"


def test_setup_cfg_names_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = config["options"]["packages"].split()
    assert sorted(named) == named
    assert set(named) == set(find_packages(str(ROOT), include=["sslcli*"])) | {"sslcli.conf"}


def test_the_wheel_holds_every_module_and_every_yaml_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {f"sslcli/{path.relative_to(ROOT / 'sslcli')}" for path in (ROOT / "sslcli").rglob("*.py")}
    conf = {f"sslcli/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert names == code | conf | {"sslcli/conf/__init__.py", "sslcli/py.typed"}


def test_the_installed_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    assert "moco_v2" in run(str(installed / "ssl-train"), "--help", cwd=tmp_path)
    assert "linear" in run(str(installed / "ssl-eval"), "--help", cwd=tmp_path)
    assert "queue_size: 65536" in run(str(installed / "ssl-train"), "--cfg", "job", "method=moco", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_trains_a_step(installed: Path, tmp_path: Path) -> None:
    line = ["dataset.limit=64", "dataset.test_images=0", "train.batch_size=16", "train.max_steps=1"]
    told = run(str(installed / "ssl-train"), *line, "monitor.knn_every=0", "launcher.threads=1", cwd=tmp_path)
    assert "step 1/1" in told
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "done").exists()
