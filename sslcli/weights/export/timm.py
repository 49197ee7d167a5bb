"""format=timm: a folder that timm.create_model("local-dir:FOLDER", pretrained=True) loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sslcli.backbones.resnet import ResNet
from sslcli.backbones.timm import Timm
from sslcli.backbones.vit import VisionTransformer
from sslcli.nn.transformer import Block, LayerScale
from sslcli.weights.export.safetensors import write_safetensors
from sslcli.weights.export.target import Target, Trained, json_text
from sslcli.weights.export.torchvision import no_imagenet_resnet

VITS = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224"}  # width -> name
OF_OTHER_WEIGHTS = (
    "url",
    "hf_hub_id",
    "hf_hub_filename",
    "source",
    "file",
    "tag",
    "origin_url",
    "paper_ids",
    "license",
)


class TimmFolder(Target):
    """`config.json` and `model.safetensors`, as timm stores models on the Hugging Face Hub."""

    name = "timm"
    files = ("config.json",)
    packages = ("timm",)
    library = "timm"

    def obstacle(self, trained: Trained) -> str | None:
        net = trained.net
        if isinstance(net, ResNet):
            return no_imagenet_resnet(net)
        if isinstance(net, Timm):
            return "the architecture is described on the Hugging Face Hub, not in timm" if ":" in net.name else None
        if not isinstance(net, VisionTransformer):
            return "the format has only ResNets, vision transformers and the networks of backbone=timm"
        return None

    def write(self, trained: Trained, folder: Path) -> None:
        import timm

        name, arguments = architecture(trained.net, channels=trained.preprocessing.channels)
        # The entries about layers, such as `first_conv`, come from timm.
        known = timm.create_model(name, num_classes=0, **arguments).pretrained_cfg
        assert isinstance(known, dict)
        given = trained.preprocessing
        own = {
            "custom_load": False,
            "input_size": [given.channels, given.image_size, given.image_size],
            "interpolation": "bilinear",
            "crop_pct": given.crop_fraction,
            "crop_mode": "center",
            "mean": list(given.mean),
            "std": list(given.std),
            "num_classes": 0,
        }
        inherited = {key: value for key, value in known.items() if key not in OF_OTHER_WEIGHTS and "test" not in key}
        config = {
            "architecture": name,
            "num_classes": 0,
            "num_features": trained.net.num_features,
            "model_args": arguments,
            "pretrained_cfg": inherited | own,
        }
        (folder / "config.json").write_text(json_text(config), encoding="utf-8")
        write_safetensors(folder / self.weights_file, timm_state(trained), {"format": "pt"})

    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        import timm

        net: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return net.eval()

    def usage(self, trained: Trained) -> str:
        return """\
import timm

net = timm.create_model("local-dir:.", pretrained=True)  # instead of `.`: the path of this folder
features = net.eval()(images)
"""


def architecture(net: nn.Module, *, channels: int) -> tuple[str, dict[str, Any]]:
    """Return the name of timm's model for a backbone, and the arguments of timm.create_model."""
    images = {} if channels == 3 else {"in_chans": channels}
    if isinstance(net, ResNet):
        return net.arch, images
    if isinstance(net, Timm):
        return net.name.partition(".")[0], net.arguments
    assert isinstance(net, VisionTransformer)
    assert net.patch_size is not None
    block = net.blocks[0]
    assert isinstance(block, Block)
    width = net.num_features
    arguments = {
        "img_size": net.grid[0] * net.patch_size,
        "patch_size": net.patch_size,
        "embed_dim": width,
        "depth": len(net.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width,
        "global_pool": "token" if net.pool == "cls" else "avg",
        "fc_norm": False,  # otherwise timm normalizes after the mean over patches
        **({"reg_tokens": net.num_prefix_tokens - 1, "no_embed_class": True} if net.num_prefix_tokens > 1 else {}),
        **({"init_values": 1e-5} if isinstance(block.ls1, LayerScale) else {}),
        **images,
    }
    return VITS.get(width, VITS[192]), arguments


def timm_state(trained: Trained) -> dict[str, Tensor]:
    """Return the weights of the backbone with timm's names and shapes."""
    state, net = trained.state, trained.net
    if isinstance(net, VisionTransformer) and net.num_prefix_tokens > 1:
        # As in the models of timm with registers, only patches have positions. That of the class token is added to it.
        positions = state["pos_embed"]  # (1, 1 + P, D)
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:].clone()
    return state
