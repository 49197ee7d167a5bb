"""Launch of an evaluation: in this process, in several processes of this node, or as a Slurm job."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from sslcli.config.own_dataset import Change
from sslcli.config.run_config import EvalConfig
from sslcli.config.settings import MultiSettings
from sslcli.errors import EXIT_CONFIG, EXIT_STOPPED, ConfigError, print_error, print_unexpected
from sslcli.report.terminal import guard_terminal
from sslcli.runs.launch import check_other_launcher, run_on_this_node
from sslcli.system import child_processes
from sslcli.system.launch_variables import AGENT, launched

RESUME = "complete features are cached: run the same command again to resume"
MODULE = "sslcli.runs.evaluate_launch"


def launch(job: dict[str, Any]) -> int:
    """Run ssl-eval and return the exit code. `job` is the validated configuration as plain values."""
    config = EvalConfig.from_plain(job)
    launcher = config.launcher
    if launched() is not None and launcher.kind != "local" and AGENT not in os.environ:
        check_other_launcher(launcher)
    if launched() is None and launcher.kind == "slurm":
        from sslcli.runs import evaluate_slurm

        return evaluate_slurm.launch(job)
    if launched() is None and isinstance(launcher, MultiSettings):
        on_message = partial(print_error, "eval")
        code = run_on_this_node(MODULE, job, launcher, on_message=on_message, restarts_from="the cached features")
        if code == EXIT_STOPPED:
            print_error("eval", f"stopped by a signal; {RESUME}")
        return code
    from sslcli.runs.evaluate import run

    return run(config)


def main() -> None:
    """Run one of several processes of an evaluation: `python -m sslcli.runs.evaluate_launch CONFIG.json`."""
    # Before the evaluation installs its signal handlers, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sslcli.distributed.processes import die_with_parent, end_process

    guard_terminal()
    try:
        (path,) = child_processes.given_arguments(
            MODULE, "CONFIG.json", launcher="multi", variables=[AGENT], command="ssl-eval"
        )
        die_with_parent()
        job = json.loads(Path(path).read_text(encoding="utf-8"))
        job["_dataset_changes_"] = [Change(*change) for change in job["_dataset_changes_"]]
        child_processes.find_trusted(job["trust"])
        sys.exit(launch(job))
    except ConfigError as error:
        sys.exit(end_process("eval", error, EXIT_CONFIG, wait=0))
    except Exception as error:
        sys.exit(print_unexpected("eval", error))


if __name__ == "__main__":
    main()
