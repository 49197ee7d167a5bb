"""Base class of the export formats that write a folder, and the trained network that they get."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.files import is_noise_state, unwrapped


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained backbone, and what other tools must know about it.

    Attributes:
        net: the backbone on the CPU, in evaluation mode. Its output are the features of the run.
        build: function that returns an untrained backbone of the same architecture.
        settings: `_target_` and arguments of the backbone.
        preprocessing: preprocessing of the images in evaluations.
        facts: origin of the weights, as values that JSON can represent.
    """

    net: nn.Module
    build: Callable[[], nn.Module]
    settings: dict[str, Any]
    preprocessing: Preprocessing
    facts: dict[str, Any]

    @property
    def state(self) -> dict[str, Tensor]:
        """The weights by name. If the backbone wraps a network, the names are those of the wrapped network."""
        state = {name: value for name, value in self.net.state_dict().items() if not is_noise_state(name)}
        return unwrapped(self.net, state)


class Target(ABC):
    """An export format: a folder that another tool loads without sslcli.

    Attributes:
        name: value of the setting `format`.
        weights_file: name of the file with the weights.
        files: names of further files that `write` creates.
        packages: packages of the extra `export` that `write` and `load` import.
        normalizes: True if the exported model normalizes images itself. Its input are then images in [0, 1].
        library: the library that loads the folder, for the model card of the Hugging Face Hub; "" = none.
    """

    name: ClassVar[str]
    weights_file: ClassVar[str] = "model.safetensors"
    files: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    normalizes: ClassVar[bool] = False
    library: ClassVar[str] = ""

    @abstractmethod
    def obstacle(self, trained: Trained) -> str | None:
        """Return why this backbone cannot be exported in this format, or None if it can."""

    @abstractmethod
    def write(self, trained: Trained, folder: Path) -> None:
        """Write the files of this format to an existing empty folder."""

    @abstractmethod
    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        """Load the folder as a user does. Return a function from images (N, C, H, W) to features (N, D).

        Of `trained`, only the architecture is used. The images are normalized unless `normalizes` is True.
        """

    @abstractmethod
    def usage(self, trained: Trained) -> str:
        """Return Python code that computes `features` from the tensor `images`, in the current folder."""


def json_text(content: dict[str, Any]) -> str:
    """Return the text of a JSON file that people can read."""
    return json.dumps(content, indent=2) + "\n"


def not_finite(weights: Mapping[str, Any]) -> str | None:
    """Return a message about the weights that are NaN or infinite, or None if there are none."""
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if not broken:
        return None
    return (
        f"{len(broken)} of {len(tensors)} tensors are not finite, {broken[0]} among them: the run diverged; export an "
        "earlier checkpoint with checkpoint=STEP"
    )
