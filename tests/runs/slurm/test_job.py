"""Jobs of a command: submission, their state, and the checks of a node."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml

from slurm_site import Site
from sslcli.config.slurm import SlurmSettings
from sslcli.errors import ConfigError
from sslcli.runs.slurm import job

CONF = Path(__file__).parents[3] / "conf" / "launcher" / "slurm.yaml"
SETTINGS = SlurmSettings(**yaml.safe_load(CONF.read_text()))


def test_a_submitted_job_is_active_until_slurm_names_a_final_state(site: Site) -> None:
    assert job.active_job(site.path) is None
    assert job.submit(site.path, "#!/bin/bash\n", {"seed": 1}, name="other.json", after="40") == "41"
    assert json.loads((site.path / "other.json").read_text()) == {"seed": 1}
    assert (site.path / "job_config").read_text() == "other.json\n"
    assert "--dependency=afterany:40" in (site.path / "submitted").read_text()
    assert "job 41 submitted, starts after job 40" in (site.path / "history.log").read_text()
    site.write("squeue", f"echo PENDING {site.path}/job.sbatch")
    assert job.active_job(site.path) == ("41", "PENDING")
    site.write("squeue", f"echo COMPLETED {site.path}/job.sbatch")
    assert job.active_job(site.path) is None


def test_a_node_with_fewer_gpus_than_requested_is_refused() -> None:
    settings = replace(SETTINGS, gpus_per_node=4)
    with patch.object(torch.cuda, "device_count", return_value=3):
        with pytest.raises(
            ConfigError, match=r"gpus_per_node is 4, but torch sees 3 GPUs.*or evaluate with device=cpu"
        ):
            job.check_gpus(settings, "auto", action="evaluate")
        job.check_gpus(settings, "cpu", action="evaluate")
        job.check_gpus(replace(SETTINGS, gpus_per_node=3), "auto", action="evaluate")


@pytest.mark.parametrize("text", ["a", "a:", ":1", "a:0", "a:65536", "a:x"])
def test_a_wrong_endpoint_is_refused(text: str) -> None:
    job.check_endpoint("node1:29500")
    with pytest.raises(ConfigError, match=r"it must be HOST:PORT"):
        job.check_endpoint(text)


@pytest.mark.parametrize("spec", ["absent.pt", "run:absent"])
def test_weights_that_do_not_exist_here_are_warned_about(spec: str) -> None:
    with pytest.warns(UserWarning, match=f"^teacher is {spec}, but it does not exist on this machine"):
        job.warn_if_missing("teacher", spec)


def test_weights_that_exist_or_need_no_file_are_not_warned_about(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for spec in (None, "timm:vit_tiny_patch16_224", f"run:{tmp_path}", str(tmp_path)):
        job.warn_if_missing("init", spec)
    assert not recwarn.list
