"""Saving and loading of networks that protocols train. protocol=distill uses these networks as teachers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from sslcli.engine import checkpoint
from sslcli.errors import ConfigError
from sslcli.evaluation.base import Outcome
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.task import FineTuned
from sslcli.evaluation.variants import join_parts
from sslcli.report.evaluation_tables import results
from sslcli.runs.evaluation import Evaluation
from sslcli.system.stored import DamagedFile, checked
from sslcli.weights.files import load_strictly, load_weights


class SavedNet(TypedDict):
    """Required keys of a file with a network that a protocol trained."""

    net: dict[str, Any]
    layer: str
    width: int
    positions: Tensor
    classes: list[str]
    dataset_fingerprint: str
    checkpoint_sha256: str


def save(outcome: Outcome, path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Write the network in `outcome` to the file `path`, and return the entries of the result file about the network.

    The entries are the file name and the checksum. `outcome` is the return value of the protocol that trained the
    network.
    """
    assert outcome.net is not None
    assert outcome.positions is not None
    buffer = io.BytesIO()
    torch.save(
        {
            "net": outcome.net.state_dict(),
            "layer": outcome.net.layer,
            "width": outcome.net.classify.in_features,
            "positions": outcome.positions,
            "classes": list(evaluation.source.classes),
            "dataset_fingerprint": evaluation.source.fingerprint,
            "dataset_version": evaluation.source.version,
            "checkpoint_sha256": evaluation.subject.provenance["checkpoint_sha256"],
        },
        buffer,
    )
    evaluation.write(path, buffer.getvalue())
    return {"net": str(path.relative_to(evaluation.subject.results_dir)), "net_sha256": checkpoint.sha256(path)}


def load(evaluation: Evaluation, requested: str) -> FineTuned:
    """Return the network that was saved with the result `requested`.

    `requested` is the name of a result or a part of it, see `find_result`.

    Raises ConfigError in four cases:

    - There is no such network.
    - The file of the network is damaged.
    - The network was fine-tuned from a checkpoint other than the checkpoint of `evaluation`.
    - The network was fine-tuned on images other than the images of `evaluation`.
    """
    name, result = find_result(evaluation, requested)
    subject, source = evaluation.subject, evaluation.source
    path, protocol = subject.results_dir / result["net"], result["protocol"]
    if not path.exists():
        raise ConfigError(f"{name}.json names the network {path}, which does not exist: run protocol={protocol} again")
    remedy = f"run protocol={protocol} again"
    if result.get("net_sha256", "") not in ("", checkpoint.sha256(path)):  # "": result of an old version
        raise DamagedFile(path, f"it does not match the checksum in {name}.json", remedy)
    state: dict[str, Any] = dict(checked(load_weights(path, device=evaluation.device), SavedNet, path, remedy=remedy))
    version = state.get("dataset_version", source.version)  # files of older versions contain only the fingerprint
    if (state["dataset_fingerprint"], version) != (source.fingerprint, source.version):
        raise ConfigError(f"the teacher {path} was trained on other images: run protocol={protocol} again")
    if state["checkpoint_sha256"] != subject.provenance["checkpoint_sha256"]:
        raise ConfigError(
            f"the teacher {path} is of another checkpoint: run protocol={protocol} again, or set checkpoint to that one"
        )
    shape = {"width": state["width"], "num_classes": len(state["classes"])}
    net = Classifier(subject.build_untrained(), state["layer"], images=evaluation.task().example(), **shape)
    load_strictly(net, state["net"], str(path))
    provenance = {
        "protocol": protocol,
        "measured": result.get("measured", protocol),
        "net": str(path.relative_to(subject.results_dir)),
        "sha256": checkpoint.sha256(path),
    }
    return FineTuned(net=net, positions=state["positions"].cpu(), provenance=provenance)


def find_result(evaluation: Evaluation, requested: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the result `requested`.

    Only results with a saved network are searched. Their checkpoint and dataset must be those of `evaluation`.

    The name of a result starts with its protocol and its variant, as in `semi_5-per-class`. The variant (`5-per-class`)
    stands for those settings of the protocol that change the measured quantity.

    `requested` is a protocol, a protocol with its variant, or the full name of a result. A protocol without a variant
    also matches all of its variants.

    If several results match, the exact match is returned. Raises ConfigError if no result matches, or if several
    results match and none of them exactly.
    """
    results_dir, matches = evaluation.subject.results_dir, {}
    for name, result in results(results_dir, evaluation.screen).items():
        measured = result.get("measured", result["protocol"])
        fits = measured == requested or measured.startswith(f"{requested}_") or name == requested
        if "net" in result and fits and name == join_parts(measured, evaluation.conditions):
            matches[measured] = (name, result)
    if len(matches) > 1 and requested not in matches:
        raise ConfigError(f"protocol.teacher is {requested!r}, which matches several: {', '.join(matches)}. Choose one")
    if not matches:
        of = f" of {evaluation.conditions}" if evaluation.conditions else ""
        raise ConfigError(
            f"there is no teacher {requested!r}{of} in {results_dir}: first run "
            f"protocol={requested.partition('_')[0]} on the same run"
        )
    return matches[requested] if requested in matches else next(iter(matches.values()))
