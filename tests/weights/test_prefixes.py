"""Prefixes of networks in a checkpoint: search, order of preference, and groups of other keys."""

from __future__ import annotations

import pytest

from sslcli.weights.prefixes import counts_of_prefixes, groups, matches, rank


def test_every_prefix_of_a_name_is_counted() -> None:
    keys = ["module.q.conv1.weight", "module.q.bn1.weight", "module.k.conv1.weight", "module.q.layer1.conv1.weight"]
    found = counts_of_prefixes(keys, {"conv1.weight", "bn1.weight"})
    assert found == {"module.q.": 2, "module.k.": 1, "module.q.layer1.": 1}
    assert counts_of_prefixes(["conv1.weight"], {"conv1.weight"}) == {"": 1}


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("state_dict.module.encoder_q.", "state_dict.module.encoder_k."),  # MoCo
        ("module.base_encoder.", "module.momentum_encoder."),  # MoCo v3
        ("teacher.backbone.", "student.module.backbone."),  # DINO, iBOT, DINOv2
        ("target_encoder.module.", "encoder.module."),  # I-JEPA
        ("online_encoder.net.", "target_encoder.net."),  # BYOL
        ("online_network_state_dict.encoder.", "target_network_state_dict.encoder."),
        ("state_dict.backbone.", "state_dict.momentum_backbone."),  # solo-learn
        ("backbone.", "backbone_momentum."),  # lightly
        ("teacher_backbone.", "student_backbone."),
        ("state_dict_ema.", "state_dict."),  # timm
        ("encoder_q.", "base_encoder."),
        ("base_encoder.", "teacher."),
        ("teacher.", "backbone."),
    ],
)
def test_the_evaluated_network_comes_first(better: str, worse: str) -> None:
    assert rank(better) < rank(worse)


def test_a_prefix_may_be_given_without_the_names_of_outer_dictionaries() -> None:
    assert matches("state_dict.module.encoder_k.", "module.encoder_k")
    assert matches("state_dict.module.encoder_k.", "encoder_k.")
    assert not matches("state_dict.module.encoder_k.", "coder_k")
    assert not matches("state_dict.module.encoder_k.", "module")
    assert matches("", "")
    assert not matches("module.", "")


def test_other_keys_are_grouped_by_the_name_at_which_they_leave_the_prefix() -> None:
    keys = ["a.q.fc.weight", "a.q.fc.bias", "a.q.queue", "a.k.conv1.weight", "a.queue", "optimizer.0.x"]
    expected = {"fc.*": 2, "queue": 1, "a.k.*": 1, "a.queue": 1, "optimizer.*": 1}
    assert groups(keys, "a.q.") == expected
    assert groups(["fc.weight", "queue"], "") == {"fc.*": 1, "queue": 1}
