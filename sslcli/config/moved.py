"""Names of version 0.1 that are still accepted: modules, classes, choices of config groups, and keys of settings.

Old names occur in configurations of runs, exported files, records of sweeps, yaml files of users, and plug-ins. Code
that reads such files calls functions of this module, which convert old names to current names.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from sslcli.errors import ConfigError

# Module name before version 0.2 -> current name.
MODULES = {
    "sslcli.allocator": "sslcli.system.memory",
    "sslcli.atomic": "sslcli.system.atomic",
    "sslcli.cached_gradients": "sslcli.engine.gradient_cache",
    "sslcli.checkpoint": "sslcli.engine.checkpoint",
    "sslcli.checkpoint_names": "sslcli.engine.checkpoint_names",
    "sslcli.cli._launch": "sslcli.runs.launch",
    "sslcli.cli._slurm": "sslcli.runs.slurm_job",
    "sslcli.compiled": "sslcli.kernels.library",
    "sslcli.cores": "sslcli.system.cpu",
    "sslcli.data.augment": "sslcli.data.views.augment",
    "sslcli.data.change": "sslcli.kernels.color",
    "sslcli.data.color": "sslcli.data.views.color",
    "sslcli.data.columns": "sslcli.data.sources.columns",
    "sslcli.data.csv_list": "sslcli.data.sources.csv_list",
    "sslcli.data.file_status": "sslcli.data.sources.file_status",
    "sslcli.data.files": "sslcli.data.sources.files",
    "sslcli.data.hf": "sslcli.data.sources.hf",
    "sslcli.data.hf_labels": "sslcli.data.sources.hf_labels",
    "sslcli.data.hf_stream": "sslcli.data.shards.source",
    "sslcli.data.kept": "sslcli.data.decoded_cache",
    "sslcli.data.labels": "sslcli.data.sources.labels",
    "sslcli.data.parallel": "sslcli.data.sources.parallel",
    "sslcli.data.picture": "sslcli.data.sources.picture",
    "sslcli.data.rand_augment": "sslcli.data.views.rand_augment",
    "sslcli.data.records": "sslcli.data.sources.records",
    "sslcli.data.resize": "sslcli.kernels.resize",
    "sslcli.data.scan": "sslcli.data.sources.scan",
    "sslcli.data.shapes": "sslcli.data.sources.shapes",
    "sslcli.data.shard_index": "sslcli.data.shards.index",
    "sslcli.data.shard_reader": "sslcli.data.shards.reader",
    "sslcli.data.view": "sslcli.data.views.spec",
    "sslcli.data.vision": "sslcli.data.sources.vision",
    "sslcli.decoder": "sslcli.nn.decoder",
    "sslcli.evaluate": "sslcli.evaluation",
    "sslcli.evaluate.base": "sslcli.evaluation.base",
    "sslcli.evaluate.distill": "sslcli.evaluation.distill",
    "sslcli.evaluate.features": "sslcli.evaluation.features",
    "sslcli.evaluate.finetune": "sslcli.evaluation.finetune",
    "sslcli.evaluate.knn": "sslcli.evaluation.knn",
    "sslcli.evaluate.layers": "sslcli.evaluation.layers",
    "sslcli.evaluate.linear": "sslcli.evaluation.linear",
    "sslcli.evaluate.network": "sslcli.evaluation.network",
    "sslcli.evaluate.online": "sslcli.evaluation.online",
    "sslcli.evaluate.plot": "sslcli.report.svg_plot",
    "sslcli.evaluate.result": "sslcli.evaluation.result",
    "sslcli.evaluate.semi": "sslcli.evaluation.semi",
    "sslcli.evaluate.subsets": "sslcli.evaluation.subsets",
    "sslcli.evaluate.training": "sslcli.evaluation.training",
    "sslcli.evaluate.utility": "sslcli.evaluation.utility",
    "sslcli.health": "sslcli.engine.health",
    "sslcli.heartbeat": "sslcli.distributed.watchdog",
    "sslcli.idle_threads": "sslcli.system.cpu",
    "sslcli.interpreter": "sslcli.system.child_processes",
    "sslcli.launch": "sslcli.distributed.elastic",
    "sslcli.losses": "sslcli.nn.contrastive",
    "sslcli.migrations": "sslcli.engine.migrations",
    "sslcli.mixture": "sslcli.methods.mixture",
    "sslcli.noise": "sslcli.nn.noise",
    "sslcli.optim": "sslcli.engine.optim",
    "sslcli.pieces": "sslcli.engine.sharded_checkpoint",
    "sslcli.precision": "sslcli.engine.precision",
    "sslcli.regular_files": "sslcli.system.regular_files",
    "sslcli.schedule": "sslcli.nn.schedule",
    "sslcli.settings": "sslcli.config.settings",
    "sslcli.sharding": "sslcli.engine.fsdp",
    "sslcli.slurm": "sslcli.runs.slurm",
    "sslcli.slurm.queue": "sslcli.runs.slurm.queue",
    "sslcli.slurm.script": "sslcli.runs.slurm.script",
    "sslcli.stopping": "sslcli.engine.stop",
    "sslcli.train": "sslcli.engine.loop",
    "sslcli.watch": "sslcli.engine.monitor",
    "sslcli.winograd": "sslcli.kernels.winograd",
    "sslcli.winograd_passes": "sslcli.kernels.winograd_passes",
    "sslcli.winograd_transforms": "sslcli.kernels.winograd_transforms",
}
# Package that was a module before version 0.2 -> the module that now contains most of its classes.
PACKAGES = {
    "sslcli.data.shards": "sslcli.data.shards.formats",
    "sslcli.data.sources": "sslcli.data.sources.base",
    "sslcli.data.views": "sslcli.data.views.views",
}
FOLDER = Path(__file__).parent / "renamed"  # yaml files with old names of choices
# New module name -> {old name: new name} of functions that plug-ins import.
FUNCTIONS = {"sslcli.nn.contrastive": {"mutual_info_nce": "nt_xent_symmetric"}}
# Config group -> {old name of a choice: new name}.
CHOICES = {"views": {"mocov1": "moco_v1", "mocov2": "moco_v2"}}
# Old key -> new key.
KEYS = {
    "dataset.unlabelled": "dataset.unlabeled",
    "monitor.health_every": "monitor.health_every_steps",
    "monitor.knn_every": "monitor.knn_every_epochs",
    "train.log_every": "train.log_every_steps",
}
DEFAULTS = {  # default values of the renamed keys, as in the yaml files of sslcli
    "dataset.unlabeled": False,
    "monitor.health_every_steps": 50,
    "monitor.knn_every_epochs": 1,
    "train.log_every_steps": 10,
}


def reject_old_attributes(kind: type, renamed: dict[str, str]) -> None:
    """Raise ConfigError if the class `kind` defines an attribute or a method under its old name.

    Such an attribute or method would have no effect. `renamed` maps old names to current names.
    """
    for old, new in renamed.items():
        if old in vars(kind):
            raise ConfigError(f"{kind.__module__}.{kind.__qualname__} sets {old}, which is now {new}: rename it")


def current_target(target: str) -> str:
    """Return the current dotted name of a class, or `target` itself if the class was not moved.

    `target` is a value of the key `_target_`: `sslcli.data.files.Folder` -> `sslcli.data.sources.files.Folder`.
    """
    module, _, name = target.rpartition(".")
    return f"{PACKAGES.get(module) or MODULES.get(module, module)}.{name}" if module else target


def current_override(line: str, *, own_folder: Path | None = None) -> str:
    """Replace old names in an override of a command line by current names, in the key and in the value.

    For example, `views=mocov2` becomes `views=moco_v2`. `own_folder` is the folder that the user passes with
    `--config-dir`. If a value is the name of a yaml file in this folder, the value is kept, even if it is also an old
    name.
    """
    prefix, key, rest = _parts(line)
    key = KEYS.get(key, key)
    group = key.split("@")[0]
    choices = CHOICES.get(group, {})

    def current(word: re.Match[str]) -> str:
        is_own = own_folder is not None and (own_folder / group / f"{word[0]}.yaml").exists()
        return word[0] if is_own else choices.get(word[0], word[0])

    return prefix + key + re.sub(r"[\w-]+", current, rest)


def forced_override(line: str) -> str:
    """Return an override with the prefix `++` if the override has no prefix yet and its key was renamed.

    Without the prefix, Hydra rejects the override if the user's yaml file contains the key only under its old name.
    """
    prefix, key, rest = _parts(line)
    return f"++{line}" if prefix == "" and rest and key in KEYS.values() else line


def old_override(line: str) -> str:
    """Return an override in which current names are replaced by the names of version 0.1.

    The name of a default run directory contains a digest of the overrides. The digest is computed from the old names,
    so that it is the same as in version 0.1.
    """
    prefix, key, rest = _parts(line)
    key = next((old for old, new in KEYS.items() if new == key), key)
    choices = {new: old for old, new in CHOICES.get(key.split("@")[0], {}).items()}
    return prefix + key + re.sub(r"[\w-]+", lambda word: choices.get(word[0], word[0]), rest)


def _parts(line: str) -> tuple[str, str, str]:
    """Split an override into its prefix ("+", "++", "~" or ""), its key, and the rest.

    The rest begins with the equals sign.
    """
    match = re.fullmatch(r"([+~]*)([^=]*)(.*)", line, re.DOTALL)
    assert match is not None
    return match[1], match[2], match[3]


def current_config(config: dict[str, Any], *, overridden: Iterable[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration in which names of version 0.1 are replaced by current names, and a list of notes.

    The names are keys of settings, and classes in `_target_`. There is one note for each name that was replaced.

    Args:
        config: plain values, as in the `config.yaml` of a run or composed from yaml files.
        overridden: keys that the command line sets, by their current names. If `config` also contains such a key under
            its old name, the value of the old name is ignored.
    """
    notes: list[str] = []
    renamed: dict[str, Any] = _current_targets(config, notes)
    for old, new in KEYS.items():
        group, _, name = old.partition(".")
        node = renamed.get(group)
        if not isinstance(node, dict) or name not in node:
            continue
        value, name = node.pop(name), new.partition(".")[2]
        # If a yaml file of the user has the old name, the configuration has both keys. The value of the old key is then
        # used, unless the new key has a value other than its default.
        if new not in overridden and node.get(name, DEFAULTS[new]) == DEFAULTS[new]:
            node[name] = value
        notes.append(f"{old} is now {new}")
    return renamed, notes


def _current_targets(value: Any, notes: list[str]) -> Any:
    """Return a copy of nested plain values in which each `_target_` is the current name of its class.

    For each name that is replaced, a note is appended to `notes`.
    """
    if isinstance(value, dict):
        renamed = {key: _current_targets(inner, notes) for key, inner in value.items()}
        old = renamed.get("_target_")
        if isinstance(old, str) and current_target(old) != old:
            renamed["_target_"] = current_target(old)
            notes.append(f"{old} is now {renamed['_target_']}")
        return renamed
    return [_current_targets(inner, notes) for inner in value] if isinstance(value, list) else value


class MovedModules:
    """Finder and loader that import modules by their old names. A DeprecationWarning states the new name.

    The class implements the protocols of `importlib.abc`. It does not import `importlib.abc`, because the import takes
    8 ms.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec if `fullname` is an old name, else None."""
        return ModuleSpec(fullname, self) if fullname in MODULES else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None, so that Python creates an empty module.

        `exec_module` then replaces the empty module by the module with the new name.
        """

    def exec_module(self, module: ModuleType) -> None:
        """Import the module with the new name, and register it under the old name, which is the name of `module`.

        If functions of the imported module were renamed, their old names are added to it.
        """
        new = MODULES[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        found = import_module(new)
        for old, name in FUNCTIONS.get(new, {}).items():
            setattr(found, old, getattr(found, name))
        sys.modules[module.__name__] = found

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code of the renamed module whose old name is `fullname`, or None if there is no such module.

        `python -m OLD_NAME` calls this function. Batch scripts of version 0.1 that are still queued contain such
        commands.
        """
        spec = find_spec(MODULES[fullname])
        if spec is None or spec.loader is None:
            return None
        return spec.loader.get_code(MODULES[fullname])  # type: ignore[attr-defined, no-any-return]
