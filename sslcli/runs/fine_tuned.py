"""Networks that protocols leave beside their results, for protocol=distill to take as teachers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from sslcli.engine import checkpoint
from sslcli.errors import ConfigError
from sslcli.evaluation.base import Outcome
from sslcli.evaluation.network import Classifier
from sslcli.evaluation.task import FineTuned
from sslcli.report.evaluation_tables import results
from sslcli.runs.evaluation import Evaluation
from sslcli.runs.result_name import joined
from sslcli.weights.files import load_strictly, load_weights


def save(found: Outcome, path: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Write the network of an outcome; return its name and checksum for the result file."""
    assert found.net is not None
    assert found.positions is not None
    buffer = io.BytesIO()
    torch.save(
        {
            "net": found.net.state_dict(),
            "layer": found.net.layer,
            "width": found.net.classify.in_features,
            "positions": found.positions,
            "classes": list(evaluation.source.classes),
            "dataset_fingerprint": evaluation.source.fingerprint,
            "dataset_version": evaluation.source.version,
            "checkpoint_sha256": evaluation.subject.provenance["checkpoint_sha256"],
        },
        buffer,
    )
    evaluation.write(path, buffer.getvalue())
    return {"net": str(path.relative_to(evaluation.subject.home)), "net_sha256": checkpoint.sha256(path)}


def load(evaluation: Evaluation, wanted: str) -> FineTuned:
    """Return the network that the result `wanted` left, of the same checkpoint and on the same images.

    Raises ConfigError if there is none, or if it is of another checkpoint or was trained on other images.
    """
    name, result = find_result(evaluation, wanted)
    subject, source = evaluation.subject, evaluation.source
    path, protocol = subject.home / result["net"], result["protocol"]
    if not path.exists():
        raise ConfigError(f"{name}.json names the network {path}, which does not exist: run protocol={protocol} again")
    state = load_weights(path, device=evaluation.device)
    version = state.get("dataset_version", source.version)  # older versions stored the fingerprint alone
    if (state["dataset_fingerprint"], version) != (source.fingerprint, source.version):
        raise ConfigError(f"the teacher {path} was trained on other images: run protocol={protocol} again")
    if state["checkpoint_sha256"] != subject.provenance["checkpoint_sha256"]:
        raise ConfigError(f"the teacher {path} is of another checkpoint: run protocol={protocol} again, or choose that")
    shape = {"width": state["width"], "num_classes": len(state["classes"])}
    net = Classifier(subject.fresh(), state["layer"], images=evaluation.task().example(), **shape)
    load_strictly(net, state["net"], str(path))
    provenance = {
        "protocol": protocol,
        "measured": result.get("measured", protocol),
        "net": str(path.relative_to(subject.home)),
        "sha256": checkpoint.sha256(path),
    }
    return FineTuned(net=net, positions=state["positions"].cpu(), provenance=provenance)


def find_result(evaluation: Evaluation, wanted: str) -> tuple[str, dict[str, Any]]:
    """Return name and content of the result `wanted`: a protocol, or a protocol with its variant."""
    home, found = evaluation.subject.home, {}
    for name, result in results(home, evaluation.screen).items():
        measured = result.get("measured", result["protocol"])
        fits = measured == wanted or measured.startswith(f"{wanted}_") or name == wanted
        if "net" in result and fits and name == joined(measured, evaluation.measured_on):
            found[measured] = (name, result)
    if len(found) > 1 and wanted not in found:
        raise ConfigError(f"protocol.teacher is {wanted!r}, which may be any of: {', '.join(found)}. Give one of them")
    if not found:
        of = f" of {evaluation.measured_on}" if evaluation.measured_on else ""
        raise ConfigError(
            f"there is no teacher {wanted!r}{of} in {home}: make it with protocol={wanted.partition('_')[0]} on the "
            "same run first"
        )
    return found[wanted] if wanted in found else next(iter(found.values()))
