"""Composition of validated configurations from a command line.

Hydra reports errors without a suggestion, accepts any key after a plus sign, and does not check ranges. This module
therefore validates keys and values itself. It composes and validates every job of a command before any job runs and
before torch is imported.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sslcli.cli import hydra_errors
from sslcli.cli.hydra_node import SECTIONS, check_hydra, resolved
from sslcli.config import schema
from sslcli.config.added import with_defaults
from sslcli.config.backbone_choice import UNKNOWN_SIZE
from sslcli.config.channels import with_channel_statistics
from sslcli.config.folders import conf_folder
from sslcli.config.moved import FOLDER, current_config, current_override, forced_override
from sslcli.config.own_dataset import PREFIX, Change
from sslcli.config.paths import absolute_paths, numbers_as_text
from sslcli.config.plugins import plugin_folders
from sslcli.errors import ConfigError
from sslcli.runs.identity import digest_of
from sslcli.system.child_processes import find_trusted

# The package sslcli.conf exists only if sslcli is installed. In a checkout, use the path of the folder.
CONF = "pkg://sslcli.conf" if conf_folder(installed=True) else str(conf_folder())


class ConfOfPlugins(SearchPathPlugin):
    """Hydra plugin that appends folders to the search path of yaml files.

    These are the yaml folders of plug-in packages, and a folder with the yaml files of choices that were renamed after
    version 0.1.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("sslcli.renamed", f"file://{FOLDER}")
        for package, folder in plugin_folders().items():
            search_path.append(f"sslcli.plugins: {package}", f"file://{folder}")


Plugins.instance().register(ConfOfPlugins)


def checked_jobs(name: str, arguments: Namespace) -> list[dict[str, Any]]:
    """Return the resolved and validated configuration of every job of the command line, as plain Python values.

    There is one job without `--multirun`, and one job per combination of values with `--multirun`. If a Hydra sweeper
    plugin samples the values, the jobs are not known yet. Example jobs are then returned, to validate their values
    before the sweep. `name` is the command: train, eval, embed or export. Raises ConfigError if a configuration is
    invalid.
    """
    engine = engine_of(arguments)
    try:
        overrides = _parsed(engine, arguments.overrides)
        swept = [override for override in overrides if override.is_sweep_override()]
        if swept and not arguments.multirun:
            raise ConfigError(
                f"{swept[0].input_line} has several values: add --multirun to run them all, write a list as "
                "key=[a,b], or quote a text that contains a comma, as in key='\"a,b\"'"
            )
        file = arguments.config_name or name
        if arguments.multirun:
            first = _job(engine, name, file, _first(overrides))
            drawn = [current_override(f"{key}={value}") for key, value in first["_params_"].items()]
            overrides = [*_parsed(engine, drawn), *overrides]
            lines = _samples(overrides) if first["_choices_"]["hydra/sweeper"] != "basic" else _points(overrides)
        else:
            lines = [_first(overrides)]
        return [_job(engine, name, file, line) for line in lines]
    finally:
        GlobalHydra.instance().clear()


def _first(overrides: list[Override]) -> list[str]:
    """Return the overrides of the first job.

    An override of `--multirun` may have several values, as in `seed=0,1`. The first job has the first value of each
    override.
    """
    return [_values(each)[0] if each.is_sweep_override() else each.input_line or "" for each in overrides]


def _values(override: Override) -> list[str]:
    """Return one override per value of an override with several values: `seed=0,1` -> `seed=0` and `seed=1`.

    For a continuous interval, return one override for each end.
    """
    key = override.get_key_element()
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [f"{key}={interval.start}", f"{key}={interval.end}"]
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"cannot expand the jobs of --multirun: {hydra_errors.one_line(error)}") from error


def _points(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of each job of `--multirun`. There is one job for every combination of values."""
    try:
        return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"cannot expand the jobs of --multirun: {hydra_errors.one_line(error)}") from error


def _samples(overrides: list[Override]) -> list[list[str]]:
    """Return the overrides of example jobs, to validate the values that a Hydra sweeper may sample.

    The jobs themselves are not known before the sweeper runs. In the first example, all overrides have their first
    value. Every other example differs from the first one in one override. Together, the examples contain every value
    of every override.
    """
    lines = [_first(overrides)]
    for place, override in enumerate(overrides):
        if override.is_sweep_override():
            lines += [[*lines[0][:place], value, *lines[0][place + 1 :]] for value in _values(override)[1:]]
    return lines


def engine_of(arguments: Namespace) -> Hydra:
    """Return the Hydra object that composes configurations.

    Raises ConfigError if the folder of `--config-dir` or `--config-path` does not exist.
    """
    for flag, folder in (("--config-dir", arguments.config_dir), ("--config-path", arguments.config_path)):
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"{flag} is {folder}, but there is no such folder: set it to an existing one")
    own = [Path(folder) for folder in (arguments.config_dir, arguments.config_path) if folder is not None]
    hydra_errors.check_files(arguments.overrides, [*own, *plugin_folders().values()])
    path = CONF if arguments.config_path is None else arguments.config_path
    search = create_automatic_config_search_path(None, None, path)
    if arguments.config_dir is not None:
        before_schema = SearchPathQuery(provider="schema")  # "schema" must stay the last entry of Hydra's search path
        search.prepend("command-line", f"file://{arguments.config_dir}", before_schema)
    return Hydra.create_main_hydra2(task_name="sslcli", config_search_path=search)


def _parsed(engine: Hydra, lines: list[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=engine.config_loader)
    found = []
    for line in lines:
        try:
            override = parser.parse_overrides([line])[0]
        except HydraException as error:
            raise ConfigError(hydra_errors.unreadable(line, error)) from error
        if not override.key_or_group:
            raise ConfigError(hydra_errors.unreadable(line))
        found.append(override)
    return found


def _job(engine: Hydra, command: str, config_name: str, lines: list[str]) -> dict[str, Any]:
    overrides = _parsed(engine, lines)
    hydra_errors.check_choices(command, overrides, engine)
    changes = _changes_of_dataset(engine, command, config_name, overrides)
    overrides = [each for each in overrides if each not in changes]
    try:
        config = _composed(engine, command, config_name, [each.input_line or "" for each in overrides])
    except ConfigError as error:
        choices = [override.input_line or "" for override in overrides if hydra_errors.is_choice(override, engine)]
        base = _composed(engine, command, config_name, choices)
        find_trusted(
            base.get("trust") or [str(each.input_line) for each in overrides if hydra_errors.group_of(each) == "trust"]
        )
        hydra_errors.check_overrides(command, [o for o in overrides if o.input_line not in choices], base)
        raise error
    hydra_errors.check_deletions(overrides, config)
    job, notes = current_config(plain(config), overridden=[hydra_errors.group_of(each) for each in overrides])
    for note in notes:
        hydra_errors.print_note(command, note)
    if "dataset" in job:
        job["dataset"] = with_channel_statistics(with_defaults(job["dataset"]))
    find_trusted(job.get("trust") or [])
    job = numbers_as_text(command, job, lines)
    schema.check(command, job)
    own = config.hydra
    for node in (OmegaConf.to_container(own, resolve=False), resolved(own, only=SECTIONS)):
        check_hydra(node, job.get("trust", []))
    return absolute_paths(command, job) | {
        "_choices_": OmegaConf.to_container(own.runtime.choices),
        "_overrides_": digest_of(lines),
        "_lines_": lines,
        "_params_": dict(OmegaConf.select(own, "sweeper.params") or {}),
        "_sweep_dir_": str(own.sweep.dir),
        "_run_dir_": job.get("run_dir"),  # as the user wrote it; used to name the jobs of a sweep
        "_dataset_changes_": [change_of(each) for each in changes],
    }


def _changes_of_dataset(engine: Hydra, command: str, config_name: str, overrides: list[Override]) -> list[Override]:
    """Return the overrides `dataset.KEY=value` that ssl-eval and ssl-embed apply to the dataset of the run.

    The result is [] if the command line chooses a dataset, because Hydra then applies the overrides to this dataset. It
    is also [] for other commands. Raises ConfigError for `weights=FILE` without a dataset.
    """
    changes = [each for each in overrides if command in ("eval", "embed") and is_change(each)]
    if not changes or any(hydra_errors.group_of(each) == "dataset" for each in overrides):
        return []
    if any(hydra_errors.group_of(each) == "weights" for each in overrides):
        raise ConfigError(
            f"{hydra_errors.group_of(changes[0])} is set, but weights=FILE has no dataset to change: choose one with "
            "dataset=..."
        )
    others = [each.input_line or "" for each in overrides if each not in changes]
    return changes if _composed(engine, command, config_name, others).get("dataset") is None else []


def _composed(engine: Hydra, command: str, name: str, lines: list[str]) -> DictConfig:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*is not available", category=UserWarning)
            return engine.compose_config(
                config_name=name,
                overrides=[forced_override(line) for line in lines],
                run_mode=RunMode.RUN,
                from_shell=True,
                validate_sweep_overrides=False,
                with_log_configuration=False,
            )
    except MissingConfigException as error:
        raise ConfigError(hydra_errors.missing(error)) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"a configuration file cannot be read: {hydra_errors.one_line(error)}") from error
    except (HydraException, OmegaConfBaseException, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ConfigError(hydra_errors.readable(error, groups=schema.GROUPS[command])) from error
    except UserWarning as error:
        raise ConfigError(
            f"hydra.searchpath has a folder that does not exist: {hydra_errors.one_line(error)}"
        ) from error


def plain(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain values with all interpolations resolved, without the `hydra` node.

    If no dataset is chosen, a backbone is that of images with 224 pixels and 3 channels.

    Raises ConfigError if an interpolation cannot be resolved.
    """
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        without_dataset = own.get("dataset") is None
        if without_dataset:  # the backbone refers to keys of the dataset
            OmegaConf.update(own, "dataset", {"image_size": UNKNOWN_SIZE, "channels": 3}, force_add=True)
        plain = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}cannot resolve the value: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    if without_dataset:
        del plain["dataset"]
    return {str(key): value for key, value in plain.items()}


def is_change(override: Override) -> bool:
    """Return True if an override sets a key of the dataset, as in `dataset.KEY=value`, and False otherwise."""
    return hydra_errors.group_of(override).startswith(PREFIX)


def change_of(override: Override) -> Change:
    """Convert an override `dataset.KEY=value` to a `Change`, its form in plain values.

    Raises ConfigError if an interpolation in the value cannot be resolved.
    """
    key = hydra_errors.group_of(override)
    prefix = "++" if override.is_force_add() else "+" if override.is_add() else "~" if override.is_delete() else ""
    try:
        value = OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}: cannot resolve the value: {str(error).splitlines()[0]}") from error
    assert isinstance(value, dict)
    return Change(prefix, key.removeprefix(PREFIX), value["value"])
