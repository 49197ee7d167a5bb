from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from small_runs import differences
from sslcli.methods.base import Batch
from sslcli.methods.infomin import InfoMin, cells_of, crops_of
from sslcli.methods.moco import MoCo
from sslcli.nn.batch_norm import SplitBatchNorm
from sslcli.nn.contrastive import info_nce
from tiny import TinyNet, make_batch

SETTINGS = {"dim": 4, "queue_size": 12, "bn_group": 4, "temperature": 0.2}


def tiny(*, norm: bool = True, **changes: object) -> InfoMin:
    torch.manual_seed(0)
    return InfoMin(TinyNet(norm=norm), **(SETTINGS | changes))  # type: ignore[arg-type]


def three_views(count: int = 8, *, side: int = 27) -> Batch:
    batch = make_batch(count)
    whole = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(7))
    return Batch([*batch.views, whole], batch.index, batch.label)


def test_without_the_jigsaw_it_is_moco_v2_bit_for_bit() -> None:
    ours = tiny(jigsaw_weight=0.0)
    torch.manual_seed(0)
    moco = MoCo(TinyNet(), **SETTINGS, mlp_head=True)  # type: ignore[arg-type]
    assert ours.num_views == moco.num_views == 2
    assert differences(ours.state_dict(), moco.state_dict()) == []
    for step in range(4):
        found = []
        for method in (ours, moco):
            scalars = method.train()(make_batch(8, seed=step))
            method.zero_grad()
            scalars["loss"].backward()
            with torch.no_grad():
                for parameter in method.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
            method.after_step(step / 4)
            found.append(scalars)
        assert differences(*found) == []
        assert differences(ours.state_dict(), moco.state_dict()) == []


def test_cells_and_whole_patches_tile_the_image() -> None:
    images = torch.rand(2, 3, 255, 255)
    cells = cells_of(images)
    assert cells.shape == (2, 9, 3, 85, 85)
    for number in range(9):
        line, place = divmod(number, 3)
        want = images[:, :, 85 * line : 85 * line + 85, 85 * place : 85 * place + 85]
        assert torch.equal(cells[:, number], want)
    whole = tiny(jigsaw_patch=1.0).patches(images)
    assert torch.equal(whole, cells)
    lines = [torch.cat(list(whole[:, 3 * line : 3 * line + 3].unbind(1)), dim=3) for line in range(3)]
    assert torch.equal(torch.cat(lines, dim=2), images)


def test_a_patch_of_64_pixels_lies_anywhere_in_its_cell_of_85() -> None:
    method = tiny()
    # The red value is the row, the green one the column.
    line = torch.arange(255.0).view(1, 1, -1, 1).expand(40, 1, 255, 255)
    patches = method.patches(torch.cat((line, line.transpose(2, 3)), 1))
    assert patches.shape == (40, 9, 2, 64, 64)
    corner = patches[..., 0, 0]  # (N, 9, 2)
    cell = torch.tensor([[85 * (n // 3), 85 * (n % 3)] for n in range(9)])
    offset = corner - cell
    assert sorted(offset.unique().tolist()) == list(range(22))
    assert len(offset.flatten(1).unique(dim=0)) == 40
    for axis in (0, 1):
        steps = patches[:, :, axis].diff(dim=2 + axis)
        assert (steps == 1).all()
    assert not torch.equal(offset[..., 0], offset[..., 1])


def test_crops_are_those_of_plain_slices() -> None:
    cells, generator = torch.rand(5, 9, 3, 7, 7), torch.Generator().manual_seed(0)
    corner = torch.randint(0, 4, (5, 9, 2), generator=generator)
    got = crops_of(cells, corner, 4)
    for image in range(5):
        for cell in range(9):
            top, left = corner[image, cell].tolist()
            assert torch.equal(got[image, cell], cells[image, cell, :, top : top + 4, left : left + 4])


class Ordered(nn.Module):
    """Return the concatenated codes unchanged, instead of the last linear layer."""

    def forward(self, codes: Tensor) -> Tensor:
        self.seen = codes
        return codes


def test_patches_are_shuffled_within_their_image_alone_and_differently_in_each() -> None:
    method = tiny(norm=False)
    method.patch_head, method.jigsaw_head = nn.Identity(), Ordered()  # type: ignore[assignment]
    # The code of a patch is its own number: image * 9 + cell.
    method.patches = lambda images: torch.arange(float(len(images) * 9)).view(-1, 9, 1)  # type: ignore[method-assign]
    method.backbone = nn.Identity()
    orders = []
    for _ in range(2):
        method.jigsaw(torch.zeros(200, 1, 1, 1))
        seen = method.jigsaw_head.seen.long()
        image, cell = seen // 9, seen % 9
        assert (image == torch.arange(200).unsqueeze(1)).all()
        assert (cell.sort(1).values == torch.arange(9)).all()
        orders.append(cell)
    assert len(orders[0].unique(dim=0)) > 195
    assert not torch.equal(*orders)
    # Every cell appears at every position.
    assert all(len(orders[0][:, place].unique()) == 9 for place in range(9))


def test_the_loss_weighs_the_image_and_its_patches_against_the_same_key() -> None:
    batch = three_views()
    twins = [tiny(norm=False, jigsaw_weight=weight) for weight in (0.25, 1.0)]
    moco = tiny(norm=False, jigsaw_weight=0.0)
    moco.load_state_dict(twins[0].state_dict(), strict=False)
    plain = moco(Batch(batch.views[:2], batch.index, batch.label))
    quarter, whole = (method(batch) for method in twins)
    torch.testing.assert_close(whole["loss"], whole["jigsaw_loss"])
    torch.testing.assert_close(quarter["jigsaw_loss"], whole["jigsaw_loss"])
    torch.testing.assert_close(quarter["loss"], 0.75 * plain["loss"] + 0.25 * whole["jigsaw_loss"])
    twin = tiny(norm=False)
    twin.load_state_dict(tiny(norm=False).state_dict())
    query = twin.jigsaw(batch.views[2])
    key = F.normalize(twin.momentum_head(twin.momentum_backbone(batch.views[1])), dim=1)
    want = info_nce(query, key, twin.queue, temperature=0.2)
    torch.testing.assert_close(whole["jigsaw_loss"], want.loss)
    torch.testing.assert_close(whole["jigsaw_accuracy"], want.accuracy)


def test_only_the_key_of_the_whole_view_is_enqueued() -> None:
    method, batch = tiny(norm=False), three_views(5)
    keys = F.normalize(method.momentum_head(method.momentum_backbone(batch.views[1])), dim=1)
    method(batch)
    method.after_step(0.0)
    assert int(method.queue_head) == 5
    torch.testing.assert_close(method.queue[:5], keys)


def test_batch_norm_sees_the_patches_of_as_many_images_as_it_sees_images(monkeypatch: pytest.MonkeyPatch) -> None:
    method, groups = tiny(), []
    forward = SplitBatchNorm.forward
    monkeypatch.setattr(
        SplitBatchNorm,
        "forward",
        lambda self, x: (groups.append((len(x), self.num_groups(len(x)))), forward(self, x))[1],
    )
    method.train()(three_views(16))
    assert groups == [(16, 4), (16, 4), (144, 4)]
    assert all(part.group == 4 for part in method.modules() if isinstance(part, SplitBatchNorm))


def test_every_new_part_learns() -> None:
    method = tiny()
    method.train()(three_views())["loss"].backward()
    for part in (method.backbone, method.head, method.patch_head, method.jigsaw_head):
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())


def test_the_heads_are_those_of_pycontrast() -> None:
    method = InfoMin(TinyNet(), dim=128, queue_size=8)
    widths = [(layer.in_features, layer.out_features) for layer in method.patch_head if isinstance(layer, nn.Linear)]
    assert widths == [(8, 8), (8, 128)]
    assert (method.jigsaw_head.in_features, method.jigsaw_head.out_features) == (9 * 128, 128)
    assert method.num_views == 3
    assert method.effective(32)["patches per image"] == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jigsaw_weight": 1.5}, r"jigsaw_weight is 1\.5, .* \[0, 1\]"),
        ({"jigsaw_weight": -0.1}, "jigsaw_weight is -0.1"),
        ({"jigsaw_patch": 0.0}, "jigsaw_patch is 0.0"),
        ({"jigsaw_patch": 1.1}, "jigsaw_patch is 1.1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_view_that_cannot_be_cut_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"jigsaw view has 32 x 32 pixels, .*size to a multiple of 3"):
        tiny()(three_views(side=32))


def test_the_heads_of_image_and_patches_have_the_same_hidden_width() -> None:
    method = tiny(hidden=16)
    assert [layer.out_features for layer in (method.head[0], method.patch_head[0])] == [16, 16]
