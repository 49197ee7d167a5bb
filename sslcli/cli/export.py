"""ssl-export: writes the trained weights of a run for sslcli or another tool. See conf/export.yaml."""

from __future__ import annotations

import os
import sys
from typing import Any

from sslcli.cli.help import show_and_exit
from sslcli.errors import ConfigError


def main() -> None:
    """Run the console script."""
    show_and_exit("export")
    from sslcli.cli.command import command

    sys.exit(command("export", export))


def export(config: dict[str, Any]) -> int:
    """Run the export of a validated configuration, and return the exit code."""
    if config["run"] is None:
        raise ConfigError("give run=DIR, the directory of the run to export")
    if not os.path.isdir(config["run"]):
        raise ConfigError(f"run is {config['run']!r}, but there is no such directory")
    if config["format"] == "torch" and config["out"] is not None and os.path.isdir(config["out"]):
        raise ConfigError(f"out is {config['out']!r}, but that is a directory: set it to a file name")
    from sslcli.config.run_config import export_config
    from sslcli.runs.export import run

    return run(export_config(config))


if __name__ == "__main__":
    main()
