"""Submission of an evaluation to Slurm, and its node processes, with stand-ins for the commands of Slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from slurm_site import Site
from sslcli.distributed import elastic
from sslcli.errors import ConfigError
from sslcli.runs import evaluate, evaluate_slurm
from sslcli.runs.slurm import queue
from sslcli.system.stored import DamagedFile

LINE = ["run=run", "protocol=knn", "launcher=slurm"]


@pytest.fixture
def submitted(site: Site) -> Path:
    """The folder of a job that was submitted for a run."""
    (site.path / "run" / "checkpoints").mkdir(parents=True)
    (site.path / "run" / "checkpoints" / "step-000003.pt").touch()
    code, out, err = site.evaluate(*LINE, "launcher.nodes=2", "launcher.processes_per_node=2")
    assert (code, err, site.submissions) == (0, "", 1)
    (folder,) = (site.path / "run" / "eval" / "slurm").iterdir()
    assert out.splitlines() == [
        f"job 41: {site.path}/run",
        f"  follow it: tail -n +1 -F {folder}/41.log",
        "  cancel it: scancel 41",
    ]
    site.write("squeue", f"echo RUNNING {folder}/job.sbatch")
    return folder


def test_a_submission_writes_the_script_of_an_evaluation(submitted: Path, site: Site) -> None:
    script = (submitted / "job.sbatch").read_text()
    assert "#SBATCH --job-name=ssl-eval-run\n" in script
    assert f"sslcli.runs.evaluate_slurm {submitted}/config.json)" in script
    assert f"saved() {{ find {site.path}/run -path '*/features/*.pt' 2>/dev/null | sort; }}" in script
    values = evaluate_slurm.stored_values(submitted / "config.json")
    assert (values["run"], values["launcher"]["nodes"]) == (str(site.path / "run"), 2)


def test_the_same_evaluation_is_submitted_once(submitted: Path, site: Site) -> None:
    code, out, _ = site.evaluate(*LINE, "workers=3", "launcher.partition=other")
    assert (code, site.submissions) == (0, 1)
    assert out.startswith("job 41 is RUNNING for this evaluation already\n")
    assert site.evaluate(*LINE, "protocol.k=7")[0] == 0
    assert site.evaluate(*LINE, "dataset.limit=20")[0] == 0
    assert (site.submissions, len(list(submitted.parent.iterdir()))) == (3, 3)


def test_waiting_prints_the_log_and_ends_with_the_code_of_the_job(submitted: Path, site: Site) -> None:
    (submitted / "41.log").write_text("results: run/eval\n")
    (submitted / "41.exit").write_text("3\n")
    code, out, _ = site.evaluate(*LINE, "launcher.wait=true")
    assert code == 3
    assert out.endswith("results: run/eval\n")
    with patch.object(queue, "follow", side_effect=KeyboardInterrupt):
        code, _, err = site.evaluate(*LINE, "launcher.wait=true")
    assert code == 130
    assert "ssl-eval: job 41 continues in the background; scancel 41 cancels it" in err


def test_a_folder_without_runs_is_refused_before_it_waits_in_the_queue(site: Site) -> None:
    (site.path / "run").mkdir()
    code, _, err = site.evaluate(*LINE)
    assert (code, site.submissions) == (2, 0)
    assert "run is neither a run directory nor a directory of runs with checkpoints" in err
    assert not (site.path / "run" / "eval").exists()


def test_the_job_of_a_weight_file_is_beside_the_file(site: Site) -> None:
    (site.path / "net.pt").touch()
    code, _, err = site.evaluate("weights=net.pt", "dataset=shapes", "backbone=small", "launcher=slurm")
    assert (code, err) == (0, "")
    (folder,) = (site.path / "net.pt.eval" / "slurm").iterdir()
    assert f"find {site.path}/net.pt.eval -path" in (folder / "job.sbatch").read_text()


def test_the_job_of_weights_of_timm_is_in_the_folder_of_their_results_and_is_submitted_once(site: Site) -> None:
    line = ["weights=timm:hub/net.v1", "dataset=shapes", "launcher=slurm"]
    assert site.evaluate(*line)[0] == 0
    (folder,) = (site.path / "timm_hub_net.v1.eval" / "slurm").iterdir()
    assert f"find {site.path}/timm_hub_net.v1.eval -path" in (folder / "job.sbatch").read_text()
    site.write("squeue", f"echo RUNNING {folder}/job.sbatch")  # Slurm reports absolute paths
    assert (site.evaluate(*line)[0], site.submissions) == (0, 1)


def node(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run one node of a job of which every process ends with `code`, and return the arguments of the agent."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_NODEID", "1")
    with patch.object(elastic, "run_processes", return_value=code) as agent:
        assert evaluate_slurm.run_node(folder / "config.json", "node1:1234") == code
    return {"arguments": agent.call_args.args[0], **agent.call_args.kwargs}


def test_a_node_starts_its_processes_and_a_stopped_job_is_requeued(
    submitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = node(submitted, 0, monkeypatch)
    assert found["arguments"][-2:] == ["sslcli.runs.evaluate_launch", str(submitted / "config.json")]
    assert (found["processes"], found["max_restarts"]) == (2, 0)
    assert (found["rendezvous"].nodes, found["rendezvous"].node) == (2, 1)
    assert not (submitted / "want_requeue").exists()
    node(submitted, 75, monkeypatch)
    assert (submitted / "want_requeue").read_text() == "stopped by a signal"


def test_a_job_of_one_process_has_no_agent(submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = json.loads((submitted / "config.json").read_text())
    values["launcher"] |= {"nodes": 1, "processes_per_node": 1}
    (submitted / "config.json").write_text(json.dumps(values))
    with patch.object(evaluate, "run", return_value=0) as run:
        assert evaluate_slurm.run_node(submitted / "config.json", "node1:1234") == 0
    assert run.call_args.args[0].run == str(submitted.parents[2])


def test_a_damaged_configuration_of_a_job_is_refused(submitted: Path) -> None:
    path = submitted / "config.json"
    values = json.loads(path.read_text())
    values["launcher"]["nodes"] = "two"
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedFile, match=r"config\.json is damaged \(.*\): run the same ssl-eval command again"):
        evaluate_slurm.stored_values(path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"there is no .*config\.json"):
        evaluate_slurm.stored_values(path)
