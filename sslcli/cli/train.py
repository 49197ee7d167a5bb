"""ssl-train: pre-trains a backbone without labels. See conf/train.yaml for all settings."""

from __future__ import annotations

import sys

from sslcli.cli.help import show_and_exit


def main() -> None:
    """Run the console script."""
    show_and_exit("train")
    from sslcli.cli.command import command
    from sslcli.runs.launch import launch

    sys.exit(command("train", launch))


if __name__ == "__main__":
    main()
