"""format=onnx: a graph from images in [0, 1] to features, for ONNX Runtime and other runtimes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.export.target import Target, Trained

OPSET = 18
NUM_EXAMPLES = 2  # a batch of one image would be exported as a constant
LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")


class Normalized(nn.Module):
    """A backbone that normalizes its input: images (N, C, H, W) in [0, 1] -> features (N, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - self.mean) / self.std)  # type: ignore[no-any-return]


class Onnx(Target):
    """`model.onnx` with the input `images` (N, C, S, S) float32 in [0, 1] and the output `features` (N, D).

    The number of images N is dynamic. The graph normalizes the images.
    """

    name = "onnx"
    weights_file = "model.onnx"
    files = ("model.onnx.data",)  # the weights of networks above 2 GB
    packages = ("onnx", "onnxscript", "onnxruntime")
    normalizes = True

    def obstacle(self, trained: Trained) -> str | None:
        return None

    def write(self, trained: Trained, folder: Path) -> None:
        given = trained.preprocessing
        images = torch.rand(NUM_EXAMPLES, given.channels, given.image_size, given.image_size)
        with quiet():
            torch.onnx.export(
                Normalized(trained.net, given).eval(),
                (images,),
                str(folder / self.weights_file),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                external_data=_num_bytes(trained.net) > 2**31 - 2**20,  # the limit of a file without external data
            )

    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors only
        session = onnxruntime.InferenceSession(
            str(folder / self.weights_file), options, providers=["CPUExecutionProvider"]
        )

        def run(images: Tensor) -> Tensor:
            (features,) = session.run(["features"], {"images": images.numpy()})
            return torch.from_numpy(features)

        return run

    def usage(self, trained: Trained) -> str:
        return f"""\
import onnxruntime

session = onnxruntime.InferenceSession("{self.weights_file}", providers=["CPUExecutionProvider"])
(features,) = session.run(["features"], {{"images": images.numpy()}})  # the graph normalizes the images
"""


def _num_bytes(net: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in net.state_dict().values())


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the warnings and log messages of the exporter within the `with` block."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
