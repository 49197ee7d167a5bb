"""The export formats by name."""

from __future__ import annotations

from sslcli.weights.export.hf import HuggingFace
from sslcli.weights.export.onnx import Onnx
from sslcli.weights.export.safetensors import Safetensors
from sslcli.weights.export.target import Target
from sslcli.weights.export.timm import TimmFolder
from sslcli.weights.export.torchvision import Torchvision

ALL = (Safetensors(), Torchvision(), TimmFolder(), Onnx(), HuggingFace())
TARGETS: dict[str, Target] = {target.name: target for target in ALL}
