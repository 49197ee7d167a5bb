"""Names of other libraries; that loaded networks compute the same is tested in test_published.py."""

from __future__ import annotations

import torch

from sslcli.weights.key_layouts import (
    flattened,
    from_dinov2,
    from_hugging_face_resnet,
    from_hugging_face_vit,
    from_sequential,
)

ONE = torch.zeros(1)


def test_nested_dictionaries_are_joined_and_other_values_omitted() -> None:
    content = {
        "epoch": 3,
        "state_dict": {"a.weight": ONE, "noise._extra_state": ONE},
        "opt": {"state": {0: {"m": ONE}}},
    }
    content["sparse"] = torch.eye(2).to_sparse()
    content["meta"] = torch.empty(2, device="meta")  # without values
    assert flattened(content).keys() == {"state_dict.a.weight", "opt.state.0.m"}
    cyclic: dict[str, object] = {"a": ONE}
    cyclic["self"] = cyclic
    assert "self.a" in flattened(cyclic)


def test_registers_and_chunks_of_dinov2_are_renamed() -> None:
    assert from_dinov2({"blocks.1.norm1.weight": ONE}) is None
    assert from_dinov2(
        {"backbone.register_tokens": ONE, "blocks.1.7.norm1.weight": ONE, "blocks.1.norm1.weight": ONE}
    ) == {
        "backbone.reg_token": ONE,
        "blocks.7.norm1.weight": ONE,
        "blocks.1.norm1.weight": ONE,
    }


def test_positions_of_a_sequential_resnet_are_renamed() -> None:
    stages = {f"b.{n}.0.conv1.weight": ONE for n in (2, 3, 4, 5)} | {
        "b.3.0.shortcut.0.weight": ONE,
        "head.0.weight": ONE,
    }
    assert from_sequential(stages) is None
    found = from_sequential(stages | {"b.0.weight": ONE, "b.1.weight": ONE})
    assert found is not None
    assert found.keys() == {
        *("b.conv1.weight", "b.bn1.weight", "b.layer2.0.downsample.0.weight", "head.0.weight"),
        *(f"b.layer{n}.0.conv1.weight" for n in (1, 2, 3, 4)),
    }


def test_layouts_of_hugging_face_are_not_seen_elsewhere() -> None:
    flat = {"conv1.weight": ONE, "patch_embed.proj.weight": ONE}
    assert from_hugging_face_vit(flat) is None
    assert from_hugging_face_resnet(flat) is None


def test_query_key_and_value_are_joined_only_if_all_are_there() -> None:
    patches = {"embeddings.patch_embeddings.projection.weight": ONE}
    start = "vit.encoder.layer.0.attention.attention"
    parts = {f"{start}.{name}.bias": torch.full((2,), float(n)) for n, name in enumerate(("query", "key", "value"))}
    found = from_hugging_face_vit(patches | parts)
    assert found is not None
    assert found["vit.blocks.0.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]
    parts.pop(f"{start}.key.bias")
    found = from_hugging_face_vit(patches | parts)
    assert found is not None
    assert "vit.blocks.0.attn.query.bias" in found
