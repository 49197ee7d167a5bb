"""The run and the checkpoint of an export: weights, network, origin, and preprocessing of images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslcli import __version__
from sslcli.config.own_dataset import FINGERPRINT, image_settings
from sslcli.config.settings import ExportSettings
from sslcli.data.views.views import Views
from sslcli.engine.checkpoint import Loaded
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.runs import directory
from sslcli.runs.build import build_backbone, build_views, find_class
from sslcli.runs.checkpoint_of_run import load_checkpoint, provenance_of
from sslcli.runs.teacher import stored_features
from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.files import is_noise_state, load_strictly


@dataclass(frozen=True)
class ExportedRun:
    """A run, and the checkpoint that is exported.

    Attributes:
        run_dir: the run directory.
        saved: the configuration of the run.
        loaded: the checkpoint.
        method: the class of the method.
        trust: trusted packages, see `find_class`.
    """

    run_dir: Path
    saved: dict[str, Any]
    loaded: Loaded
    method: type[Method]
    trust: list[str]

    @classmethod
    def read(cls, config: ExportSettings) -> ExportedRun:
        """Read the configuration and the checkpoint of a run. Raises ConfigError if one of them cannot be read."""
        run_dir = Path(str(config.run))
        saved = directory.read_trained_config(run_dir)
        directory.check_input(run_dir, saved)
        loaded = load_checkpoint(run_dir, config.checkpoint, saved)
        method = find_class(saved["method"]["_target_"], base=Method, trust=config.trust, where="method._target_")
        return cls(run_dir, saved, loaded, method, config.trust)

    @property
    def image_size(self) -> int:
        """Side of the training images in pixels."""
        return int(self.saved["dataset"]["image_size"])

    @cached_property
    def views(self) -> Views:
        """The views of the run. Only their color space and normalization are used."""
        return build_views(self.saved["views"], trust=self.trust)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The entries of an export that describe the training of the weights, as plain values."""
        saved, dataset = self.saved, self.saved["dataset"]
        mean, std = self.views.statistics(mean=dataset["mean"], std=dataset["std"])
        return {
            "backbone": saved["backbone"],
            "method": saved["method"],
            "seed": saved["seed"],
            "num_images": saved["effective"]["training images"],
            "teacher_features": stored_features(saved["effective"]),
            "dataset": image_settings(dataset),
            "image_fingerprint": saved["effective"].get(FINGERPRINT),
            "image_size": dataset["image_size"],
            "mean": mean,
            "std": std,
            "views": saved["views"],
            "precision": saved["effective"]["precision"],
            "monitor": saved["monitor"],
            "provenance": provenance_of(saved, self.run_dir, self.loaded),
            "sslcli": __version__,
        }

    def backbone_weights(self) -> dict[str, Any]:
        """Return the weights of the evaluated part of the method, with the names of the backbone."""
        prefix = f"{self.method.evaluated_part}."
        return {
            name.removeprefix(prefix): value
            for name, value in self.loaded.weights.items()
            if name.startswith(prefix) and not is_noise_state(name)
        }

    def new_backbone(self) -> nn.Module:
        """Return an untrained backbone of the run."""
        return build_backbone(self.saved["backbone"], image_size=self.image_size, trust=self.trust)

    def backbone(self, weights: dict[str, Any]) -> nn.Module:
        """Return the backbone with `weights`, in evaluation mode.

        Raises ConfigError unless the backbone without the rest of the method computes the same features as the method.
        """
        remedy = (
            "so the backbone alone does not give the accuracies of the run: export what=method with "
            "format=torch, which ssl-eval weights=FILE evaluates as well"
        )
        name = self.method.__name__
        if self.method.features is not Method.features:
            raise ConfigError(f"what is 'backbone', but {name} overrides features, {remedy}")
        backbone = self.new_backbone()
        try:
            load_strictly(backbone, weights, "the checkpoint")
        except ConfigError as error:
            raise ConfigError(f"what is 'backbone', but {name} changes the layers of the backbone, {remedy}") from error
        return backbone.eval()

    def prepare(self, images: Tensor) -> Tensor:
        """Convert images (N, C, H, W) in [0, 1] to the color space and normalization of the run."""
        dataset = self.saved["dataset"]
        return self.views.finish(images, mean=dataset["mean"], std=dataset["std"])

    def preprocessing(self, *, is_native: bool) -> Preprocessing:
        """Return the preprocessing of images in evaluations of the run.

        `is_native` is True if all images of the dataset have the size of the center crop, so that none is resized.
        """
        return Preprocessing(
            image_size=self.image_size,
            resized_side=self.image_size if is_native else round(self.image_size * 8 / 7),
            mean=tuple(self.facts["mean"]),
            std=tuple(self.facts["std"]),
            color_space=self.views.color_space,
        )
