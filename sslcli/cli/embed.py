"""ssl-embed: writes the features of images to a file. See conf/embed.yaml."""

from __future__ import annotations

import sys
from typing import Any

from sslcli.cli.help import show_and_exit
from sslcli.errors import ConfigError


def main() -> None:
    """Run the console script."""
    show_and_exit("embed")
    from sslcli.cli.command import command

    sys.exit(command("embed", embed))


def embed(config: dict[str, Any]) -> int:
    """Write the features of a validated configuration, and return the exit code."""
    from sslcli.runs.network_choice import check_changes, check_network, with_run_of_weights

    config = with_run_of_weights(config)
    check_network(config, "give run=DIR, or weights=FILE, and not both")
    if config["images"] is not None and (config.get("dataset") is not None or config["_dataset_changes_"]):
        raise ConfigError("images and dataset are both set: remove one of them")
    if config["images"] is not None and config["split"] != "all":
        raise ConfigError(f"split is {config['split']!r}, but images=... have no splits: remove split")
    if config["run"] is None and config["images"] is None and config.get("dataset") is None:
        raise ConfigError("weights=FILE requires images=... or dataset=...: choose the images to embed")
    if config["out"] is None:
        raise ConfigError("out is null: set it to the file to write, FILE.parquet or FILE.npy")
    check_changes(config)
    from sslcli.config.run_config import EmbedConfig
    from sslcli.runs.embed import run

    return run(EmbedConfig.from_plain(config))


if __name__ == "__main__":
    main()
