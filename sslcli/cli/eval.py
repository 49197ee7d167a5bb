"""ssl-eval: evaluates the features of one or several runs, or of a backbone file. See conf/eval.yaml."""

from __future__ import annotations

import sys
from typing import Any

from sslcli.cli.help import show_and_exit


def main() -> None:
    """Run the console script."""
    show_and_exit("eval")
    from sslcli.cli.command import command

    sys.exit(command("eval", evaluate))


def evaluate(config: dict[str, Any]) -> int:
    """Run the evaluation of a validated configuration, and return the exit code."""
    from sslcli.runs.network_choice import check_changes, check_network, with_run_of_weights

    config = with_run_of_weights(config)
    check_network(config, "give run=DIR, or weights=FILE with backbone=... and dataset=..., and not both")
    check_changes(config)
    from sslcli.runs.evaluate_launch import launch

    return launch(config)


if __name__ == "__main__":
    main()
