"""format=hf: a folder that AutoModel.from_pretrained of the package transformers loads without a network connection.

Vision transformers become a ViTModel, or a Dinov2Model or Dinov2WithRegistersModel if they have LayerScale or
registers. ResNets become a ResNetModel. The parameters have the names of the checkpoints on the Hugging Face Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sslcli.backbones.resnet import ResNet
from sslcli.backbones.vit import VisionTransformer
from sslcli.nn.transformer import Block, LayerScale
from sslcli.weights.export.preprocessing import Preprocessing
from sslcli.weights.export.safetensors import write_safetensors
from sslcli.weights.export.target import Target, Trained, json_text
from sslcli.weights.export.torchvision import no_imagenet_resnet

BILINEAR = 2  # PIL.Image.Resampling.BILINEAR
# Names in a block of a vision transformer -> names of ViTModel, and of Dinov2Model.
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PROJECTION = "embeddings.patch_embeddings.projection"


class HuggingFace(Target):
    """`config.json`, `model.safetensors` and `preprocessor_config.json`, for the package transformers."""

    name = "hf"
    files = ("config.json", "preprocessor_config.json")
    packages = ("transformers",)
    library = "transformers"

    def obstacle(self, trained: Trained) -> str | None:
        net = trained.net
        if trained.preprocessing.channels != 3:
            return f"the images have {trained.preprocessing.channels} channels, and the format has only RGB"
        if isinstance(net, ResNet):
            if net.arch.startswith("wide"):
                return "the format has no wide ResNets"
            return no_imagenet_resnet(net)
        if not isinstance(net, VisionTransformer):
            return "the format has only the vision transformers and ResNets of sslcli"
        if is_dinov2(net) and hidden_width(net) % net.num_features:
            return "Dinov2Model of transformers needs an integer mlp_ratio"
        return None

    def write(self, trained: Trained, folder: Path) -> None:
        net, size = trained.net, trained.preprocessing.image_size
        if isinstance(net, ResNet):
            config, state = resnet_config(net), resnet_state(trained.state)
        else:
            assert isinstance(net, VisionTransformer)
            config, state = vit_config(net, size), vit_state(net, trained.state)
        (folder / "config.json").write_text(json_text({**config, "num_channels": 3}), encoding="utf-8")
        processor = processor_config(trained.preprocessing)
        (folder / "preprocessor_config.json").write_text(json_text(processor), encoding="utf-8")
        write_safetensors(folder / self.weights_file, state, {"format": "pt"})

    def load(self, trained: Trained, folder: Path) -> Callable[[Tensor], Tensor]:
        from transformers import AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        net, info = AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        wrong = {key: list(names) for key, names in info.items() if names}
        if wrong:
            raise ValueError(f"the names of transformers differ: {wrong}")
        net.eval()
        if isinstance(trained.net, ResNet):
            return lambda images: net(images).pooler_output.flatten(1)
        assert isinstance(trained.net, VisionTransformer)
        if trained.net.pool == "cls":
            return lambda images: net(images).last_hidden_state[:, 0]
        first = trained.net.num_prefix_tokens
        return lambda images: net(images).last_hidden_state[:, first:].mean(1)

    def usage(self, trained: Trained) -> str:
        net = trained.net
        if isinstance(net, VisionTransformer):
            tokens = (
                "0]  # the class token" if net.pool == "cls" else f"{net.num_prefix_tokens}:].mean(1)  # of patches"
            )
            features = f"last_hidden_state[:, {tokens}"
        else:
            features = "pooler_output.flatten(1)"
        return f"""\
from transformers import AutoModel

net = AutoModel.from_pretrained(".")  # instead of `.`: the path of this folder
features = net.eval()(images).{features}
"""


def is_dinov2(net: VisionTransformer) -> bool:
    """Return True if a vision transformer has LayerScale or registers, which ViTModel lacks."""
    return net.reg_token is not None or isinstance(first_block(net).ls1, LayerScale)


def first_block(net: VisionTransformer) -> Block:
    """Return the first block of a vision transformer. All blocks have the same sizes."""
    block = net.blocks[0]
    assert isinstance(block, Block)
    return block


def hidden_width(net: VisionTransformer) -> int:
    """Return the hidden width of the MLPs of a vision transformer."""
    return first_block(net).mlp.fc1.out_features


def vit_config(net: VisionTransformer, image_size: int) -> dict[str, Any]:
    """Return the content of config.json for a vision transformer."""
    shared = {
        "hidden_size": net.num_features,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": first_block(net).attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": net.norm.eps,
        "image_size": image_size,
        "patch_size": net.patch_size,
        "qkv_bias": True,
    }
    if not is_dinov2(net):
        # With an identity as pooler, pooler_output is the class token, and no weight is missing.
        kind = {"model_type": "vit", "architectures": ["ViTModel"], "pooler_act": "linear"}
        return {**kind, **shared, "intermediate_size": hidden_width(net)}
    registers = net.num_prefix_tokens - 1
    kind = {"model_type": "dinov2", "architectures": ["Dinov2Model"]}
    if registers:
        kind = {"model_type": "dinov2_with_registers", "architectures": ["Dinov2WithRegistersModel"]}
        shared["num_register_tokens"] = registers
    return {**kind, **shared, "mlp_ratio": hidden_width(net) // net.num_features}


def vit_state(net: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a vision transformer with the names of ViTModel or Dinov2Model."""
    width, names = net.num_features, DINOV2_BLOCK if is_dinov2(net) else VIT_BLOCK
    found = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        f"{PROJECTION}.weight": state["patch_embed.proj.weight"],
        f"{PROJECTION}.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    if is_dinov2(net):
        found["embeddings.mask_token"] = torch.zeros(1, width)
    else:
        found |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    if net.reg_token is not None:
        found["embeddings.register_tokens"] = state["reg_token"]
    for number in range(len(net.blocks)):
        old, new = f"blocks.{number}", f"encoder.layer.{number}"
        for kind in ("weight", "bias"):
            parts = state[f"{old}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{new}.attention.attention.{name}.{kind}"] = part
            found |= {f"{new}.{name}.{kind}": state[f"{old}.{own}.{kind}"] for own, name in names.items()}
        if is_dinov2(net):
            for scale in ("1", "2"):
                gamma = state.get(f"{old}.ls{scale}.gamma", torch.ones(width))
                found[f"{new}.layer_scale{scale}.lambda1"] = gamma
    return found


def resnet_config(net: ResNet) -> dict[str, Any]:
    """Return the content of config.json for a ResNet."""
    stages = [stage for stage in (net.layer1, net.layer2, net.layer3, net.layer4) if isinstance(stage, nn.Sequential)]
    is_bottleneck = hasattr(stages[0][0], "conv3")
    return {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "embedding_size": net.conv1.out_channels,
        "depths": [len(stage) for stage in stages],
        "hidden_sizes": [(256 if is_bottleneck else 64) * 2**number for number in range(4)],
        "layer_type": "bottleneck" if is_bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def resnet_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a ResNet with the names of ResNetModel."""
    return {_resnet_name(name): value for name, value in state.items()}


def _resnet_name(name: str) -> str:
    """`layer2.0.bn1.weight` -> `encoder.stages.1.layers.0.layer.0.normalization.weight`."""
    *parts, layer, kind = name.split(".")
    if not parts:  # conv1.weight, bn1.weight
        return f"embedder.embedder.{'convolution' if layer == 'conv1' else 'normalization'}.{kind}"
    block = f"encoder.stages.{int(parts[0].removeprefix('layer')) - 1}.layers.{parts[1]}"
    if parts[2:] == ["downsample"]:
        return f"{block}.shortcut.{'convolution' if layer == '0' else 'normalization'}.{kind}"
    part = "convolution" if layer.startswith("conv") else "normalization"
    return f"{block}.layer.{int(layer[-1]) - 1}.{part}.{kind}"


def processor_config(given: Preprocessing) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": given.resized_side},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": given.image_size, "width": given.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": given.is_normalized,
        "image_mean": list(given.mean),
        "image_std": list(given.std),
    }
