from __future__ import annotations

import pytest
import torch

from sslcli.backbones import Backbone
from sslcli.errors import check_positive


class Bare(Backbone):
    num_features = 3


def test_a_backbone_without_maps_says_which_one_it_is() -> None:
    with pytest.raises(ValueError, match=r"backbone Bare .*no feature maps.*define stages"):
        Bare().stages(torch.zeros(1, 3, 8, 8))


def test_a_backbone_without_patch_tokens_says_which_ones_have_them() -> None:
    with pytest.raises(
        ValueError, match=r"backbone Bare has no patch tokens: choose backbone=vit_tiny.*define patch_size"
    ):
        Bare().tokens(torch.zeros(1, 3, 8, 8))
    assert (Bare().patch_size, Bare().num_prefix_tokens) == (None, 0)


def test_a_backbone_without_forward_says_which_one_it_is() -> None:
    with pytest.raises(NotImplementedError, match="Bare"):
        Bare()(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("value", [0, -1, 2.5, "8"])
def test_a_count_must_be_a_positive_integer(value: object) -> None:
    with pytest.raises(ValueError, match=r"depth is .* integer of at least 1"):
        check_positive(depth=value)  # type: ignore[arg-type]
    check_positive(depth=1)
