"""The wheel is complete: it works in an empty environment, and so does a plug-in package."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
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

from small_runs import differences, newest
from sslcli.kernels import library

ROOT = Path(__file__).parents[1]
SHIPPED = ["setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "sslcli", "conf"]
PLUGIN = ROOT / "tests" / "plugin"
PAGE = ROOT / "docs" / "add-a-method.md"
PAGES = [PAGE, ROOT / "docs" / "add-a-protocol.md", ROOT / "docs" / "add-a-backbone.md"]  # show the plug-in's files
FEW = [
    "dataset.limit=64",
    "dataset.test_images=40",
    "train.batch_size=16",
    "monitor.knn_every_epochs=0",
    "launcher.threads=1",
]


def run(*line: str, cwd: Path, code: int = 0, **variables: str) -> str:
    """Run a command without our paths; return its output. Fail unless it exits with `code`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    ended = subprocess.run(
        line, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert ended.returncode == code, ended.stdout[-3000:]
    return ended.stdout


def build(source: Path, out: Path, **variables: str) -> Path:
    """The wheel of the package in `source`."""
    try:
        here = int(version("setuptools").partition(".")[0]) >= 71  # the first that needs no `wheel`
    except PackageNotFoundError:
        here = False
    isolation = ["--no-build-isolation"] if here else []
    line = ["-m", "pip", "wheel", str(source), "--no-deps", *isolation, "--wheel-dir", str(out)]
    run(sys.executable, *line, cwd=out, **variables)
    (found,) = out.glob("*.whl")
    return found


def copy_of_the_project(folder: Path) -> Path:
    for name in SHIPPED:
        part = ROOT / name
        if part.is_dir():
            shutil.copytree(part, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.sharedlib"))
        else:
            shutil.copy(part, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing built earlier gets into it."""
    return build(copy_of_the_project(tmp_path_factory.mktemp("copy")), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment that holds the wheel, and borrows what it depends on."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel), cwd=environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    # The .pth files in there are not followed, and so neither is an editable installation.
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(str(python), "-c", "import sslcli; print(sslcli.__file__)", cwd=environment).strip()
    assert Path(where).is_relative_to(packages)
    return environment / "bin"


def test_setup_cfg_names_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = config["options"]["packages"].split()
    assert sorted(named) == named
    assert set(named) == set(find_packages(str(ROOT), include=["sslcli*"])) | {"sslcli.conf"}


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def libraries() -> set[str]:
    """What is compiled, by its names in a wheel."""
    found = {str(library.file_of(part).relative_to(ROOT)) for part in library.PARTS}
    assert len(found) == len(list((ROOT / "sslcli").rglob("*.c"))) == 3
    return found


def test_without_a_compiler_the_wheel_lacks_what_is_compiled_alone(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "out").mkdir()
    plain = build(copy_of_the_project(tmp_path / "copy"), tmp_path / "out", CC="no-compiler")
    assert names_in(wheel) - names_in(plain) == libraries()
    assert names_in(plain) < names_in(wheel)


def test_the_wheel_holds_every_module_and_every_yaml_and_nothing_else(wheel: Path) -> None:
    code = {f"sslcli/{path.relative_to(ROOT / 'sslcli')}" for path in (ROOT / "sslcli").rglob("*.py")}
    conf = {f"sslcli/conf/{path.relative_to(ROOT / 'conf')}" for path in (ROOT / "conf").rglob("*.yaml")}
    others = {"sslcli/conf/__init__.py", "sslcli/py.typed", "sslcli/runs/slurm/job.sh"}
    renamed = {f"sslcli/{path.relative_to(ROOT / 'sslcli')}" for path in (ROOT / "sslcli").rglob("*.yaml")}
    assert names_in(wheel) == code | conf | renamed | others | libraries()


IMPORT_ALL = """
import importlib, pkgutil, sslcli

def fail(name):
    raise ImportError(name)

names = [found.name for found in pkgutil.walk_packages(sslcli.__path__, "sslcli.", onerror=fail)]
for name in names:
    importlib.import_module(name)
from sslcli.kernels import library
print(len(names), *library.present())
"""


def test_every_module_of_the_wheel_can_be_imported(installed: Path, tmp_path: Path) -> None:
    """Documentation tools and others walk all modules; the compiled libraries must not look like modules."""
    count, *parts = run(str(installed / "python"), "-c", IMPORT_ALL, cwd=tmp_path).split()
    modules = [path for path in (ROOT / "sslcli").rglob("*.py") if path != ROOT / "sslcli/__init__.py"]
    assert int(count) == len(modules) + 1  # sslcli.conf
    assert parts == library.present()


def test_every_module_of_an_editable_installation_can_be_imported(tmp_path: Path) -> None:
    project = copy_of_the_project(tmp_path)
    venv.create(tmp_path / "environment", with_pip=False)
    python = str(tmp_path / "environment/bin/python")
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    line = ["-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "-e", str(project)]
    run(sys.executable, *line, cwd=tmp_path)
    where = run(python, "-c", "import sslcli; print(sslcli.__file__)", cwd=tmp_path).strip()
    assert Path(where) == project / "sslcli/__init__.py"
    assert run(python, "-c", IMPORT_ALL, cwd=tmp_path).split()[1:] == library.present()


def test_the_installed_command_explains_itself(installed: Path, tmp_path: Path) -> None:
    assert "moco_v2" in run(str(installed / "ssl-train"), "--help", cwd=tmp_path)
    assert "linear" in run(str(installed / "ssl-eval"), "--help", cwd=tmp_path)
    assert "queue_size: 65536" in run(str(installed / "ssl-train"), "--cfg", "job", "method=moco", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_trains_a_step(installed: Path, tmp_path: Path) -> None:
    line = ["dataset.limit=64", "dataset.test_images=0", "train.batch_size=16", "train.max_steps=1"]
    output = run(str(installed / "ssl-train"), *line, "monitor.knn_every_epochs=0", "launcher.threads=1", cwd=tmp_path)
    assert "step 1/1" in output
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert (run_dir / "done").exists()


def blocks(language: str, page: Path = PAGE) -> list[str]:
    """Return the fenced blocks of a language on a page that explains the package."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_pages_show_the_package_that_is_tested() -> None:
    shown = {}
    for text in [block for page in PAGES for name in ("python", "yaml", "toml") for block in blocks(name, page)]:
        (name,) = re.findall(r"^# (\S+\.(?:py|yaml|toml))\n", text, flags=re.MULTILINE)
        shown[name] = text.replace(f"# {name}\n", "", 1)
    files = [path for path in PLUGIN.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert shown == {str(path.relative_to(PLUGIN)): path.read_text("utf-8") for path in files}


@pytest.fixture(scope="module")
def with_plugin(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands, after somebody has installed a package with a method."""
    source, out = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("plugin_wheel")
    shutil.copytree(PLUGIN, source, ignore=shutil.ignore_patterns("__pycache__"))
    wheel, python = build(source, out), installed / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", str(wheel), cwd=out)
    return installed


def test_the_method_of_a_package_is_found_by_its_name(with_plugin: Path, tmp_path: Path) -> None:
    train = str(with_plugin / "ssl-train")
    assert "hypersphere" in run(train, "--help", cwd=tmp_path)
    assert "alpha: 2.0" in run(train, "--help", "method=hypersphere", cwd=tmp_path)
    output = run(train, "--cfg", "job", "method=hypersphere", "method.t=3", cwd=tmp_path)
    assert "_target_: hypersphere.Hypersphere" in output
    assert "t: 3" in output
    assert "flip" in output  # of the views it chooses
    output = run(train, "method=hypershere", cwd=tmp_path, code=2)
    assert "Did you mean 'hypersphere'?" in output


def test_the_keys_of_the_method_of_a_package_are_checked(with_plugin: Path, tmp_path: Path) -> None:
    train = str(with_plugin / "ssl-train")
    (dialogue,) = [text for text in blocks("console") if "wieght" in text]
    command, answer = dialogue.rstrip("\n").split("\n")
    assert run(train, *shlex.split(command)[2:], cwd=tmp_path, code=2).strip() == answer
    output = run(train, "method=hypersphere", "method.dim=wide", cwd=tmp_path, code=2)
    assert "method.dim is 'wide', but it must be an integer" in output
    output = run(train, "method=hypersphere", "mixture=unmix", cwd=tmp_path, code=2)
    assert "hypersphere.Hypersphere does not support a mixture" in output
    assert list(tmp_path.iterdir()) == []


def test_the_method_of_a_package_trains_goes_on_and_is_measured(with_plugin: Path, tmp_path: Path) -> None:
    train, whole, half = str(with_plugin / "ssl-train"), tmp_path / "whole", tmp_path / "half"
    line = [train, "method=hypersphere", *FEW, "train.max_steps=4", "train.save_every_steps=2"]
    assert "step 4/4" in run(*line, f"run_dir={whole}", cwd=tmp_path)
    (half / "checkpoints").mkdir(parents=True)
    for path in (whole / "checkpoints").glob("step-00000002.*"):
        shutil.copy(path, half / "checkpoints")
    assert newest(half)["step"] == 2
    run(*line, f"run_dir={half}", "resume=must", cwd=tmp_path)
    assert differences(newest(half), newest(whole)) == []
    output = run(str(with_plugin / "ssl-eval"), f"run={whole}", "protocol=knn", "protocol.k=5", cwd=tmp_path)
    assert "trained" in output
    assert any((whole / "eval").iterdir())


@pytest.fixture(scope="module")
def run_of_plugin(with_plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with the method and the backbone of the package."""
    folder = tmp_path_factory.mktemp("run_of_plugin")
    small = ["backbone=convmixer", "backbone.width=16", "backbone.depth=2", "train.max_steps=4"]
    run(str(with_plugin / "ssl-train"), "method=hypersphere", *small, *FEW, "run_dir=run", cwd=folder)
    return folder / "run"


def test_a_protocol_of_a_package_evaluates_a_run(with_plugin: Path, run_of_plugin: Path, tmp_path: Path) -> None:
    evaluate = str(with_plugin / "ssl-eval")
    assert "centroid" in run(evaluate, "--help", cwd=tmp_path)
    output = run(evaluate, f"run={run_of_plugin}", "protocol=centroid", cwd=tmp_path)
    assert "trained" in output
    assert "raw pixels" in output
    result = json.loads((run_of_plugin / "eval" / "centroid.json").read_text("utf-8"))
    assert (result["protocol"], result["split"]) == ("centroid", "test")
    assert (result["n_train"], result["n_test"]) == (58, 40)  # 6 of the 64 training images are in val
    for numbers in (result, *result["baselines"].values()):
        low, high = numbers["interval"]
        assert 0 <= low <= numbers["top1"] <= high <= 1
        assert numbers["top1"] <= numbers["top5"] <= 1
    assert set(result["baselines"]) == {"pixels", "random"}
    assert result["protocol_settings"] == {"seed": 0, "resamples": 1000}
    output = run(evaluate, f"run={run_of_plugin}", "protocol=centroid", "protocol.sed=1", cwd=tmp_path, code=2)
    assert "Did you mean 'seed'?" in output
    output = run(evaluate, f"run={run_of_plugin}", "protocol=centroid", "protocol.resamples=0", cwd=tmp_path, code=2)
    assert output.startswith("ssl-eval: protocol: resamples=0 must be at least 1: 1000 is usual (SSLCLI_DEBUG=1 ")
    variables = {"SSLCLI_DEBUG": "1"}
    line = ["protocol=centroid", "protocol.resamples=0"]
    output = run(evaluate, f"run={run_of_plugin}", *line, cwd=tmp_path, code=2, **variables)
    assert "centroid.py" in output
    assert "Traceback" in output


def test_a_protocol_of_a_package_trains(with_plugin: Path, run_of_plugin: Path, tmp_path: Path) -> None:
    line = ["protocol=quick_finetune", "protocol.steps=3", "protocol.batch_size=16"]
    run(str(with_plugin / "ssl-eval"), f"run={run_of_plugin}", *line, cwd=tmp_path)
    result = json.loads((run_of_plugin / "eval" / "quick_finetune.json").read_text("utf-8"))
    assert result["protocol"] == "quick_finetune"
    assert set(result["baselines"]) == {"random"}
    assert all(0 <= numbers["top1"] <= 1 for numbers in (result, result["baselines"]["random"]))


def test_a_backbone_of_a_package_is_probed_and_exported(with_plugin: Path, run_of_plugin: Path, tmp_path: Path) -> None:
    evaluate = str(with_plugin / "ssl-eval")
    run(evaluate, f"run={run_of_plugin}", "protocol=centroid", cwd=tmp_path)
    run(evaluate, f"run={run_of_plugin}", "protocol=centroid", "feature_layer=block1", cwd=tmp_path)
    assert (run_of_plugin / "eval" / "centroid_block1.json").exists()
    output = run(evaluate, f"run={run_of_plugin}", "protocol=centroid", "feature_layer=block9", cwd=tmp_path, code=2)
    assert "It has: backbone, projection, patches, block1, block2" in output
    run(str(with_plugin / "ssl-export"), f"run={run_of_plugin}", f"out={tmp_path / 'net.pt'}", cwd=tmp_path)
    images = ["dataset=shapes", "dataset.limit=64", "dataset.test_images=40"]
    run(evaluate, f"weights={tmp_path / 'net.pt'}", "protocol=centroid", *images, cwd=tmp_path)
    (path,) = (tmp_path / "net.pt.eval").glob("centroid*.json")
    of_run = json.loads((run_of_plugin / "eval" / "centroid.json").read_text("utf-8"))
    assert json.loads(path.read_text("utf-8"))["top1"] == of_run["top1"]
    output = run(
        *[str(with_plugin / "ssl-train"), "backbone=convmixer", "backbone.patch_size=5", *FEW], cwd=tmp_path, code=2
    )
    assert output.startswith("ssl-train: backbone: image_size is 32, but it must be a multiple of patch_size=5")
