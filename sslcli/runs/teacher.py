"""Teacher of a method that distills (`teacher=FILE|run:DIR|timm:NAME`): reading, and comparison with the stored record.

Checkpoints do not contain the teacher, so each start of a run reads it again. config.yaml contains its digest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sslcli.backbones.base import Backbone
from sslcli.config.run_config import RunConfig
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.errors import ConfigError
from sslcli.methods.distill import Teacher
from sslcli.runs.build import accelerate, build_backbone
from sslcli.runs.initial_weights import read_weights
from sslcli.runs.weights_source import TIMM, WeightsSource

ROW = "teacher"  # key in the section `effective` of config.yaml; only runs with a teacher have it
DIGEST = "checkpoint_sha256"  # key of a record


class TeacherOfRun:
    """The teacher of a run.

    Attributes:
        record: where the weights come from, what was taken and dropped, and the number of features, as plain values for
            config.yaml.
        summary: one line with the same facts.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.record: dict[str, Any] = {}
        self.summary = ""

    def build(self, source: Source, views: Views) -> Teacher:
        """Return the teacher for the images of a run. All processes must call this method.

        Raises ConfigError if the teacher cannot be read.
        """
        config = self.config
        found = read_weights(
            str(config.teacher),
            lambda opened: self.build_net(opened, source, views),
            prefix=config.teacher_prefix,
            trust=config.trust,
            setting="teacher",
        )
        found.net.load_state_dict(found.state)
        own_mean, own_std = found.statistics or views.statistics(mean=source.mean, std=source.std)
        mean, std = views.statistics(mean=source.mean, std=source.std)
        teacher = Teacher(accelerate(found.net), mean=mean, std=std, own_mean=own_mean, own_std=own_std)
        self.record, self.summary = found.record | {"features": teacher.num_features}, found.summary
        return teacher

    def build_net(self, opened: WeightsSource, source: Source, views: Views) -> Backbone:
        """Return the untrained network of the teacher.

        `teacher_backbone` chooses it if the source of the weights does not state it.
        """
        node = self.config.teacher_backbone or opened.backbone
        if node is None:
            raise ConfigError(
                f"teacher is {self.config.teacher}, which does not state its backbone: set teacher_backbone, as in "
                "+backbone@teacher_backbone=resnet50 teacher_backbone.stem=imagenet"
            )
        size = views.sizes(source.image_size)[0]
        if opened.where.startswith(TIMM):
            node = node | {"image_size": size, "in_channels": source.channels}
        if (channels := node.get("in_channels", source.channels)) != source.channels:
            raise ConfigError(
                f"teacher is {self.config.teacher}, which takes images with {channels} channels, but those of "
                f"{source.name} have {source.channels}: choose another teacher or dataset"
            )
        return build_backbone(node, image_size=size, trust=self.config.trust)


def check_teacher(teacher: TeacherOfRun | None, stored: dict[str, Any], run_dir: Path) -> None:
    """Raise ConfigError if the weights of the teacher have changed since the run was started.

    `stored` is the content of config.yaml, or {} for a new run.
    """
    known = (stored.get("effective") or {}).get(ROW)
    if teacher is not None and known is not None and known.get(DIGEST) != teacher.record[DIGEST]:
        raise ConfigError(
            f"teacher is {teacher.config.teacher}, but its weights have changed since the run in {run_dir} was "
            "started: restore them to resume, or choose another run_dir to start a new run"
        )


def teacher_row(teacher: TeacherOfRun | None) -> dict[str, Any]:
    """Return the entry of the section `effective` of config.yaml that describes the teacher, or {}."""
    return {} if teacher is None else {ROW: teacher.record}


def stored_features(effective: dict[str, Any]) -> int | None:
    """Return the number of features of a run's teacher, or None without a teacher.

    `effective` is the section of the run's config.yaml.
    """
    features: int | None = (effective.get(ROW) or {}).get("features")
    return features
