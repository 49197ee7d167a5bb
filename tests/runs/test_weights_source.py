"""Sources of weights: a file, an export, a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from command_line import Cli
from sslcli.backbones.small import Small
from sslcli.errors import ConfigError
from sslcli.runs.weights_source import open_weights
from sslcli.weights.published import find_weights


def test_a_run_and_its_exports_give_the_same_weights(trained: Path, cli: Cli, tmp_path: Path) -> None:
    for what in ("backbone", "method"):
        assert cli("ssl-export", f"run={trained}", f"what={what}", f"out={tmp_path / what}.pt").code == 0
    state = torch.load(trained / "checkpoints/last", weights_only=True)["method"]
    net = Small(image_size=32)
    for spec in (f"run:{trained}", f"{tmp_path}/backbone.pt", f"{tmp_path}/method.pt"):
        source = open_weights(spec, trust=[])
        assert (list(source.mean or ()), len(source.std or ())) == ([0.0, 0.0, 0.0], 3)  # SimCLR does not normalize
        found = find_weights(source.content, net, prefix=source.prefix, where=source.where)
        net.load_state_dict(found.state)
        assert torch.equal(found.state["block1.0.weight"], state["backbone.block1.0.weight"])


def test_a_plain_file_states_nothing_about_its_network(tmp_path: Path) -> None:
    torch.save(Small(image_size=32).state_dict(), tmp_path / "a.pt")
    source = open_weights(str(tmp_path / "a.pt"), trust=[])
    assert (source.prefix, source.backbone, source.mean, source.exported) == (None, None, None, {})
    assert source.provenance["weights"] == str(tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        open_weights(f"run:{tmp_path}", trust=[])


def test_a_file_in_an_exported_folder_has_the_normalization_of_the_run(trained: Path, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    assert cli("ssl-export", f"run={trained}", "format=safetensors", f"out={folder}").code == 0
    for other, named in (
        (folder, f"{folder}/model.safetensors"),
        (trained, f"run:{trained} for the newest checkpoint"),
    ):
        with pytest.raises(ConfigError, match=f"is a folder, not a file of weights: write {named}"):
            open_weights(str(other), trust=[])
    with pytest.raises(ConfigError, match=r"is a folder, not a file of weights: name the file of weights$"):
        open_weights(str(tmp_path), trust=[])
    source = open_weights(str(folder / "model.safetensors"), trust=[])
    assert (source.mean, source.std) == ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])  # SimCLR does not normalize
    assert source.image_size == 32
    (folder / "model.safetensors").rename(folder / "other.safetensors")  # not a file of ssl-export
    assert open_weights(str(folder / "other.safetensors"), trust=[]).mean is None
    (folder / "other.safetensors").rename(folder / "model.safetensors")
    (folder / "preprocessing.json").write_text('{"mean": [0.5]}')
    with pytest.raises(ConfigError, match=r"preprocessing\.json is damaged .* export the run again"):
        open_weights(str(folder / "model.safetensors"), trust=[])


@pytest.mark.parametrize(("name", "mean"), [("a.pt", [0.25]), ("model.safetensors", [0.5])])
def test_the_preprocessing_file_of_a_file_is_used(name: str, mean: list[float], tmp_path: Path) -> None:
    torch.save(Small(image_size=32).state_dict(), tmp_path / name)
    (tmp_path / "preprocessing.json").write_text('{"mean": [0.5], "std": [1], "center_crop": 48, "other": null}')
    (tmp_path / "a.pt.preprocessing.json").write_text('{"mean": [0.25], "std": [1], "center_crop": 48}')
    source = open_weights(str(tmp_path / name), trust=[])
    assert (source.mean, source.std, source.image_size) == (mean, [1], 48)
    (tmp_path / f"{name}.preprocessing.json").write_text('{"mean": [0.125], "std": [1]}')  # of this file alone
    source = open_weights(str(tmp_path / name), trust=[])
    assert (source.mean, source.image_size) == ([0.125], None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"mean": [0.5, 0.5], "std": [1]}', "mean has 2 and std has 1 values"),
        ('{"mean": [], "std": []}', "mean has 0 and std has 0 values"),
        ('{"mean": [0.5], "std": [0]}', "std greater than 0"),
        ('{"mean": [1e999], "std": [1]}', "mean is "),
        ('{"mean": [0.5], "std": [1], "center_crop": 0}', "center_crop is 0, but it must be at least 1"),
        ('{"mean": [0.5], "std": [1], "center_crop": "32"}', "center_crop is '32', but it must be an integer"),
        ("[]", "must be a mapping"),
        ("", "it is empty"),
    ],
)
def test_a_wrong_preprocessing_file_is_refused_with_its_name(content: str, message: str, tmp_path: Path) -> None:
    torch.save(Small(image_size=32).state_dict(), tmp_path / "a.pt")
    (tmp_path / "a.pt.preprocessing.json").write_text(content)
    with pytest.raises(
        ConfigError, match=rf"/a\.pt\.preprocessing\.json is damaged .*{message}.*: correct it"
    ) as error:
        open_weights(str(tmp_path / "a.pt"), trust=[])
    assert "\n" not in str(error.value)
