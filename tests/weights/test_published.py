"""Weights of published checkpoints: each official layout of keys loads with equal outputs, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from sslcli.backbones.resnet import ResNet
from sslcli.backbones.timm import Timm
from sslcli.backbones.vit import VisionTransformer
from sslcli.errors import ConfigError
from sslcli.weights.published import Found, find_weights

State = dict[str, Tensor]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
HEAD = torch.zeros(2, 2)


def under(prefix: str, state: State, *, shift: float = 0) -> State:
    """Return `state` with a prefix. With `shift`, the values differ, as those of the other network of a method."""
    return {f"{prefix}{name}": value + shift if shift else value for name, value in state.items()}


def found_in(content: Any, net: nn.Module, prefix: str | None = None) -> Found:
    return find_weights(content, net, prefix=prefix, where="a.pt")


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """torchvision's resnet18 with statistics of BatchNorm that are not those of initialization."""
    torch.manual_seed(0)
    net = models.resnet18()
    for name, buffer in net.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5 if "running" in name else torch.tensor(7))
    return net.eval()


@pytest.fixture(scope="module")
def features(resnet: nn.Module) -> Tensor:
    with torch.no_grad():
        return nn.Sequential(*list(resnet.children())[:-1])(IMAGES).flatten(1)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def own() -> ResNet:
    torch.manual_seed(1)
    return ResNet("resnet18", image_size=32, stem="imagenet").eval()


def assert_loads(found: Found, net: nn.Module, expected: Tensor) -> None:
    net.load_state_dict(found.state)
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), expected, rtol=1e-6, atol=1e-6)


# Layout -> content with the weights of a backbone, and the expected prefix
RESNETS: dict[str, tuple[Callable[[State], dict[str, Any]], str]] = {
    "torchvision": (lambda b: b | {"fc.weight": HEAD, "fc.bias": HEAD}, ""),
    "timm": (lambda b: b | {"fc.weight": HEAD}, ""),
    "DataParallel": (lambda b: under("module.", b), "module."),
    "MoCo v1 and v2": (
        lambda b: {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": {
                **under("module.encoder_k.", b, shift=1),
                **under("module.encoder_q.", b),
                **{"module.encoder_q.fc.0.weight": HEAD, "module.encoder_k.fc.0.weight": HEAD},
                **{"module.queue": HEAD, "module.queue_ptr": HEAD},
            },
            "optimizer": {"state": {0: {"momentum_buffer": HEAD}}, "param_groups": [{"lr": 0.03}]},
        },
        "state_dict.module.encoder_q.",
    ),
    "MoCo v3": (
        lambda b: {
            "state_dict": {
                **under("module.momentum_encoder.", b, shift=1),
                **under("module.base_encoder.", b),
                **{"module.base_encoder.fc.0.weight": HEAD, "module.predictor.0.weight": HEAD},
            }
        },
        "state_dict.module.base_encoder.",
    ),
    "SwAV": (
        lambda b: under("module.", b | {"projection_head.0.weight": HEAD, "prototypes.weight": HEAD}),
        "module.",
    ),
    "DINO": (
        lambda b: {
            "student": under("module.backbone.", b, shift=1) | {"module.head.mlp.0.weight": HEAD},
            "teacher": under("backbone.", b) | {"head.mlp.0.weight": HEAD, "head.last_layer.weight_g": HEAD},
            "dino_loss": {"center": HEAD},
        },
        "teacher.backbone.",
    ),
    "Barlow Twins": (
        lambda b: {"epoch": 1, "model": under("module.backbone.", b) | {"module.projector.0.weight": HEAD}},
        "model.module.backbone.",
    ),
    "VICReg": (
        lambda b: {"model": under("module.backbone.", b) | {"module.projector.0.weight": HEAD}, "optimizer": {}},
        "model.module.backbone.",
    ),
    "BYOL, sthalles/PyTorch-BYOL": (
        lambda b: {
            "online_network_state_dict": sequential("encoder.", b) | {"projetion.net.0.weight": HEAD},
            "target_network_state_dict": under("", sequential("encoder.", b), shift=1),
        },
        "online_network_state_dict.encoder.",
    ),
    "BYOL, lucidrains/byol-pytorch": (
        lambda b: under("online_encoder.net.", b) | under("target_encoder.net.", b, shift=1),
        "online_encoder.net.",
    ),
    "SimCLR, sthalles/SimCLR": (
        lambda b: {"state_dict": under("backbone.", b) | {"backbone.fc.0.weight": HEAD}},
        "state_dict.backbone.",
    ),
    "SimCLR, tonylins/simclr-converter": (lambda b: {"state_dict": b | {"fc.weight": HEAD}}, "state_dict."),
    "SimCLR, leftthomas/SimCLR": (lambda b: sequential("f.", b, places="0 1 3 4 5 6") | {"g.0.weight": HEAD}, "f."),
    "solo-learn": (
        lambda b: {
            "state_dict": {
                **under("momentum_backbone.", b, shift=1),
                **under("backbone.", b),
                **{"projector.0.weight": HEAD, "classifier.weight": HEAD},
            }
        },
        "state_dict.backbone.",
    ),
    "lightly": (
        lambda b: {
            "state_dict": {
                **sequential("backbone.", b),
                **sequential("backbone_momentum.", under("", b, shift=1)),
                **{"projection_head.layers.0.weight": HEAD},
            }
        },
        "state_dict.backbone.",
    ),
    "lightly, ResNet for small images": (
        lambda b: {
            key.replace("downsample", "shortcut"): value
            for key, value in sequential("backbone.", b, places="0 1 2 3 4 5").items()
        },
        "backbone.",
    ),
    "timm with EMA": (lambda b: {"state_dict": under("", b, shift=1), "state_dict_ema": b}, "state_dict_ema."),
    "files before PyTorch 0.4.1": (lambda b: {k: v for k, v in b.items() if "num_batches" not in k}, ""),
}


def sequential(prefix: str, state: State, *, places: str = "0 1 4 5 6 7") -> State:
    """Rename a ResNet to positions in a `torch.nn.Sequential`."""
    names = dict(zip(("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"), places.split(), strict=True))
    return {f"{prefix}{names[key.split('.')[0]]}.{key.partition('.')[2]}": value for key, value in state.items()}


@pytest.mark.parametrize("layout", RESNETS)
def test_a_resnet_of_each_layout_computes_the_same(
    layout: str, resnet: nn.Module, features: Tensor, own: ResNet
) -> None:
    body = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    make, prefix = RESNETS[layout]
    content = make(body)
    found = found_in(content, own)
    assert found.prefix == prefix
    assert_loads(found, own, features)
    assert found.taken + sum(found.dropped.values()) == number_of_tensors(content)  # every key is accounted for


def number_of_tensors(content: Any) -> int:
    if isinstance(content, dict):
        return sum(number_of_tensors(value) for value in content.values())
    return int(isinstance(content, Tensor))


def test_what_was_dropped_is_summarized(resnet: nn.Module, own: ResNet) -> None:
    body = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc.")}
    found = found_in(RESNETS["MoCo v1 and v2"][0](body), own)
    assert found.summary("a.pt") == (
        "a.pt: 120 tensors taken with the prefix state_dict.module.encoder_q.; dropped: state_dict.module.encoder_k.* "
        "(121), fc.* (1), state_dict.module.queue (1), state_dict.module.queue_ptr (1), optimizer.* (1); would fit "
        "too: state_dict.module.encoder_k."
    )
    found = found_in(RESNETS["MoCo v1 and v2"][0](body), own, "module.encoder_k")
    assert found.prefix == "state_dict.module.encoder_k."
    assert torch.equal(found.state["conv1.weight"], body["conv1.weight"] + 1)
    with pytest.raises(ConfigError, match=r"weights_prefix is 'encoder_x', .*'state_dict.module.encoder_q.', 'state"):
        found_in(RESNETS["MoCo v1 and v2"][0](body), own, "encoder_x")


def test_half_precision_is_converted_and_numbers_that_are_not_finite_are_reported(own: ResNet) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in own.state_dict().items()}
    found = found_in(half, own)
    assert found.notes == ("converted from float16",)
    assert {value.dtype for value in found.state.values()} == {torch.float32, torch.int64}
    half["conv1.weight"] = torch.full_like(half["conv1.weight"], torch.nan)
    assert found_in(half, own).notes[1] == "1 tensors are not finite, such as conv1.weight"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype: torch.dtype) -> None:
    net = nn.BatchNorm2d(2)
    state = {f"module.{name}": value.to(dtype) for name, value in net.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"4 tensors that are no .* module.weight .*dtype {str(dtype)[6:]}: give"):
        found_in(state, net)
    counter = {"num_batches_tracked": torch.tensor(2.0)}  # the counter alone may have another dtype
    assert found_in(net.state_dict() | counter, net).state["num_batches_tracked"].dtype == torch.int64


def test_very_long_and_unprintable_keys_give_messages_of_one_short_line(own: ResNet) -> None:
    start = "x." * 400 + "\n."
    assert len(found_in(under(start, own.state_dict()), own).summary("a.pt")) < 500
    for content in (under(start, {"a": HEAD}), own.state_dict() | {f"layer1.{start}": HEAD}):
        with pytest.raises(ConfigError) as error:
            found_in(content, own)
        assert len(str(error.value)) < 1000
        assert "\n" not in str(error.value)


def test_another_resnet_is_refused_and_named(own: ResNet) -> None:
    with pytest.raises(ConfigError, match=r"96 are unknown .*The file holds a resnet34 .*backbone=resnet34 backbone"):
        found_in({"model": models.resnet34().state_dict()}, own)
    small = ResNet("resnet18", image_size=32, stem="cifar")
    with pytest.raises(ConfigError, match=r"conv1.weight is \(64, 3, 7, 7\).*backbone.stem=imagenet"):
        found_in(own.state_dict(), small)
    with pytest.raises(ConfigError, match=r"it has no key of the backbone, and its keys are encoder.a"):
        found_in({"encoder": {"a": HEAD}}, own)
    with pytest.raises(ConfigError, match="contains no tensors"):
        found_in({"epoch": 3}, own)


def test_two_networks_of_equal_rank_must_be_chosen_unless_they_are_equal() -> None:
    net = nn.Linear(2, 2)
    state: State = net.state_dict()
    equal = under("encoder1.", state) | under("encoder2.", state)
    assert found_in(equal, net).others == ("encoder2.",)
    different = under("encoder1.", state) | under("encoder2.", state, shift=1)
    with pytest.raises(ConfigError, match=r"set weights_prefix to one of 'encoder1.', 'encoder2.'"):
        found_in(different, net)
    assert torch.equal(found_in(different, net, "encoder2").state["weight"], net.weight + 1)


WIDTH, DEPTH, HEADS = 24, 2, 2


def own_vit(**options: Any) -> VisionTransformer:
    arguments = {"image_size": 32, "patch_size": 8, "width": WIDTH, "depth": DEPTH, "num_heads": HEADS} | options
    return VisionTransformer(**arguments).eval()


def randomized(net: nn.Module) -> State:
    generator = torch.Generator().manual_seed(2)
    state: State = net.state_dict()
    return {name: torch.randn(value.shape, generator=generator) * 0.2 for name, value in state.items()}


VITS: dict[str, tuple[dict[str, Any], Callable[[State], dict[str, Any]], str]] = {
    "MoCo v3": (
        {},
        lambda b: {
            "state_dict": {
                **under("module.base_encoder.", b | {"head.0.weight": HEAD}),
                **under("module.momentum_encoder.", b, shift=1),
            }
        },
        "state_dict.module.base_encoder.",
    ),
    "DINO": ({}, lambda b: b, ""),
    "iBOT": (
        {},
        lambda b: {
            "student": under("module.backbone.", b, shift=1),
            "teacher": under("backbone.", b | {"masked_embed": HEAD}) | {"head.mlp.0.weight": HEAD},
        },
        "teacher.backbone.",
    ),
    "DINOv2": (
        {"registers": 4, "layer_scale": 1e-5},
        lambda b: {k.replace("reg_token", "register_tokens"): v for k, v in b.items()} | {"mask_token": HEAD},
        "",
    ),
    "DINOv2, checkpoint of the training": (
        {"layer_scale": 1e-5},
        lambda b: {
            "teacher": {
                **under("backbone.", {k.replace("blocks.", "blocks.0.", 1): v for k, v in b.items()}),
                **{"backbone.mask_token": HEAD, "dino_head.mlp.0.weight": HEAD, "ibot_head.mlp.0.weight": HEAD},
            }
        },
        "teacher.backbone.",
    ),
    "MAE": (
        {},
        lambda b: {
            "model": {
                **b,
                **{"mask_token": HEAD, "decoder_pos_embed": HEAD, "decoder_blocks.0.norm1.weight": HEAD},
                **{"decoder_embed.weight": HEAD, "decoder_norm.weight": HEAD, "decoder_pred.weight": HEAD},
            }
        },
        "model.",
    ),
    "timm": ({}, lambda b: b | {"head.weight": HEAD, "head.bias": HEAD}, ""),
    "solo-learn": (
        {},
        lambda b: {"state_dict": under("backbone.", b) | {"classifier.weight": HEAD}},
        "state_dict.backbone.",
    ),
}


@pytest.mark.parametrize("layout", VITS)
def test_a_vision_transformer_of_each_layout_computes_the_same(layout: str) -> None:
    """The names in sslcli are those of timm and of the official code, so a second network has the expected features."""
    options, make, prefix = VITS[layout]
    source, net = own_vit(**options), own_vit(**options)
    body = randomized(source)
    source.load_state_dict(body)
    content = make(body)
    found = found_in(content, net)
    assert found.prefix == prefix
    with torch.no_grad():
        assert_loads(found, net, source(IMAGES))
    assert found.taken + sum(found.dropped.values()) == number_of_tensors(content)


@pytest.mark.parametrize(
    "shapes",
    [
        {"embeddings.patch_embeddings.projection.weight": (4, 3, 2, 2)}
        | {f"encoder.layer.0.attention.attention.{name}.weight": () for name in ("query", "key", "value")},
        {"patch_embed.proj.weight": (0, 3, 2, 2), "pos_embed": (1, 5, 4), "blocks.0.mlp.fc1.weight": (8, 4)}
        | {"cls_token": (1, 1, 4)},
        {"block1.0.weight": (0, 3, 2, 2)},
    ],
)
def test_shapes_of_no_network_are_refused_without_a_traceback(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="does not fit this net"):
        found_in({name: torch.ones(shape) for name, shape in shapes.items()}, own_vit())


def test_blocks_of_blocks_are_not_taken_for_the_chunks_of_dinov2() -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("mobilenetv3_small_050", num_classes=5).state_dict()
    assert "blocks.1.0.conv_pw.weight" in state
    found = find_weights(state, Timm("mobilenetv3_small_050", image_size=32, pretrained=False), prefix=None, where="a")
    assert found.dropped == {"classifier.*": 2}


def test_a_network_of_timm_computes_the_same_in_sslcli_and_in_timm() -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "reg_tokens": 4}
    net = timm.create_model("vit_tiny_patch16_224", **options, no_embed_class=True, num_classes=5, init_values=1e-5)
    net.load_state_dict(randomized(net))
    with torch.no_grad():
        expected = net.eval().forward_head(net.forward_features(IMAGES), pre_logits=True)
    own = own_vit(registers=4, layer_scale=1e-5)
    found = found_in(net.state_dict(), own)
    assert found.notes == ("a zero position added for the class token",)
    assert_loads(found, own, expected)
    more = {"options": {**options, "no_embed_class": True, "init_values": 1e-5}, "image_size": 32}
    wrapped = Timm(
        "vit_tiny_patch16_224", **{**more, "options": {k: v for k, v in more["options"].items() if k != "img_size"}}
    ).eval()
    assert_loads(found_in({"state_dict": net.state_dict()}, wrapped), wrapped, expected)
    assert_loads(found_in(under("backbone.", wrapped.state_dict()), wrapped, "backbone"), wrapped, expected)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2WithRegisters"])
def test_a_vision_transformer_of_hugging_face_computes_the_same(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "layer_norm_eps": 1e-6}
    config = getattr(transformers, f"{kind}Config")(**sizes, intermediate_size=4 * WIDTH, image_size=32, patch_size=8)
    net = getattr(transformers, f"{kind}Model")(config).eval()
    net.load_state_dict(randomized(net))
    own = own_vit() if kind == "ViT" else own_vit(registers=4, layer_scale=1.0)
    with torch.no_grad():
        expected = net(IMAGES).last_hidden_state[:, 0]
    assert_loads(found_in(net.state_dict(), own), own, expected)
    assert_loads(found_in(classic(net.state_dict()), own), own, expected)


def classic(state: State) -> State:
    """Rename a state dict of transformers 5 to the names in published files."""
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    names |= {"o_proj": "output.dense"}
    renamed = {}
    for key, value in state.items():
        for new, old in names.items():
            key = key.replace(f"attention.{new}", f"attention.{old}")
        renamed[key if key.startswith("encoder") else key.replace("layers.", "encoder.layer.", 1)] = value
    return renamed


def test_a_resnet_of_hugging_face_computes_the_same(own: ResNet) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    net = transformers.ResNetModel(transformers.ResNetConfig(**sizes)).eval()
    with torch.no_grad():
        assert_loads(found_in(net.state_dict(), own), own, net(IMAGES).pooler_output.flatten(1))


def test_positions_of_another_image_size_are_resized_and_reported() -> None:
    found = found_in(own_vit(image_size=48).state_dict(), own_vit())
    assert found.notes == ("position embedding resized from 6x6 to 4x4 patches",)
    assert found.state["pos_embed"].shape == (1, 17, WIDTH)


def test_vision_transformers_with_other_parts_are_refused() -> None:
    state = own_vit(registers=4, layer_scale=1e-5).state_dict()
    with pytest.raises(ConfigError, match=r"unknown \(reg_token.*backbone.registers=4 backbone.layer_scale=1e-05"):
        found_in(state, own_vit())
    with pytest.raises(ConfigError, match=r"patch_embed.proj.weight is .*patches of 4 pixels"):
        found_in(own_vit(patch_size=4).state_dict(), own_vit())
    without = {"target_encoder": under("module.", own_vit().state_dict()), "predictor": {"module.norm.weight": HEAD}}
    without["target_encoder"].pop("module.cls_token")  # I-JEPA
    with pytest.raises(ConfigError, match=r"missing \(cls_token\).*without a class token, as I-JEPA.*backbone=timm"):
        found_in(without, own_vit())


def test_the_heads_of_moco_v3_are_reported() -> None:
    net = VisionTransformer(image_size=16, patch_size=8, width=384, depth=1, num_heads=6)
    found = found_in(under("module.base_encoder.", net.state_dict()), net)
    assert found.notes == ("MoCo v3's own ViT-S has 12 heads, which needs backbone.num_heads=12",)
    assert found_in(net.state_dict(), net).notes == ()
    with_twelve = VisionTransformer(image_size=16, patch_size=8, width=384, depth=1, num_heads=12)
    assert found_in(under("module.base_encoder.", net.state_dict()), with_twelve).notes == ()


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> str:
        return "own"

    def set_extra_state(self, state: str) -> None:
        assert state == "own"


def test_states_that_are_not_weights_keep_the_values_of_the_network() -> None:
    net = WithExtraState(2, 2)
    found = found_in({"module.weight": HEAD, "module.bias": HEAD[0]}, net)
    net.load_state_dict(found.state)
    dropping = own_vit(drop_path=0.1)
    dropping.load_state_dict(found_in(own_vit().state_dict(), dropping).state)
    own_vit().load_state_dict(found_in(dropping.state_dict(), own_vit()).state)
