"""Masks of image patches: counts and shapes of the official masks, and the same masks for any number of processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from golden_cases import Case, golden_cases
from sslcli.nn import masks, noise
from sslcli.nn.masks import (
    BLOCKS,
    block_mask,
    block_size,
    cell_mask,
    choice_of_ratios,
    inverse_block_mask,
    multiblock_masks,
    random_mask,
    spread_limit,
    spread_ratios,
    take_patches,
    with_exact_count,
)
from sslcli.nn.noise import Noise

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@golden_cases("mae_a")
def test_random_masks_are_those_of_mae(case: Case) -> None:
    x = case.inputs
    found = random_mask(x["noise"], case.params["mask_ratio"])
    assert torch.equal(found.keep, case.outputs["ids_keep"])
    assert torch.equal(found.restore, case.outputs["ids_restore"])
    case.check(found.mask.to(case.dtype), "mask")
    case.check(take_patches(x["tokens"], found.keep), "x_masked")


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(196, 0.75, 49), (64, 0.75, 16), (10, 0.25, 7), (9, 0.0, 9)])
def test_random_masks_have_an_exact_count(patches: int, ratio: float, visible: int) -> None:
    found = random_mask(numbers(5, patches), ratio)
    assert found.mask.sum(1).tolist() == [patches - visible] * 5
    assert found.keep.shape == (5, visible)
    assert not found.mask.gather(1, found.keep).any()
    tokens = torch.arange(patches).expand(5, -1)
    in_order = torch.cat([found.keep, tokens[found.mask].view(5, -1)], 1)
    assert torch.equal(in_order.gather(1, found.restore)[~found.mask], tokens[~found.mask])


@golden_cases("simmim_mask")
def test_cell_masks_are_those_of_simmim(case: Case) -> None:
    p = case.params
    side, cell = p["image"] // p["model_patch"], p["mask_patch"] // p["model_patch"]
    position = case.inputs["choice"].argsort(1).to(case.dtype)  # of each cell in the permutation
    found = cell_mask(position, (side, side), cell=cell, ratio=p["mask_ratio"])
    assert torch.equal(found.unflatten(1, (side, side)).long(), case.outputs["mask"])
    assert found.sum(1).tolist() == [int(case.outputs["count"]) * cell**2] * len(found)


def test_cells_of_a_grid_that_is_not_square() -> None:
    found = cell_mask(numbers(4, 2 * 3), (4, 6), cell=2, ratio=0.5).view(4, 2, 2, 3, 2)
    assert torch.equal(found.any(4).any(2), found.all(4).all(2))
    assert found.flatten(1).sum(1).tolist() == [3 * 4] * 4


def runs_of(mask: Tensor) -> int:
    """Length of the longest run of True in any row or column of (N, H, W)."""
    longest = 0
    for lines in (mask, mask.mT):
        run = torch.zeros_like(lines[..., 0], dtype=torch.int64)
        for place in lines.unbind(-1):
            run = (run + 1) * place
            longest = max(longest, int(run.max()))
    return longest


@golden_cases("ibot_masks")
def test_block_masks_have_the_properties_of_ibot(case: Case) -> None:
    p, grid = case.params, (case.params["height"], case.params["width"])
    official = case.outputs["mask"].bool()
    ratios = choice_of_ratios(numbers(2000, 2), tuple(p["pred_ratio"]), tuple(p["pred_ratio_var"]))
    assert (ratios == 0).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert ratios[ratios > 0].aminmax() == (pytest.approx(0.1, abs=0.01), pytest.approx(0.5, abs=0.01))
    targets = ratios * math.prod(grid)
    found = block_mask(
        numbers(2000, BLOCKS, 4), targets, grid, smallest=(min(grid) // 3) ** 2, aspect=tuple(p["aspect"])
    )
    count = found.sum(1)
    assert (count <= targets).all()
    assert not found[ratios == 0].any()
    gap = (case.outputs["ratio"] * math.prod(grid) - case.outputs["count"])[case.outputs["ratio"] > 0]
    assert (targets - count)[ratios > 0].mean().item() == pytest.approx(gap.mean().item(), abs=3 * spread(gap))
    assert perimeter(found.unflatten(1, grid)[ratios > 0]) == pytest.approx(
        perimeter(official[case.outputs["ratio"] > 0]), rel=0.15
    )


@golden_cases("dinov2_masks")
def test_block_masks_have_the_properties_of_dinov2(case: Case) -> None:
    p, grid = case.params, (case.params["height"], case.params["width"])
    options = {"smallest": p["min_num_patches"], "largest": p["max_num_patches"], "aspect": tuple(p["aspect"])}
    targets = case.inputs["target"].repeat(50)
    found = block_mask(numbers(len(targets), BLOCKS, 4), targets, grid, **options)
    count = found.sum(1)
    assert (count <= targets).all()
    assert not found[targets == 0].any()
    gap = (case.inputs["target"] - case.outputs["count"]).to(case.dtype)
    assert (targets - count).double().mean().item() == pytest.approx(gap.mean().item(), abs=3 * spread(gap))
    assert perimeter(found.unflatten(1, grid)) == pytest.approx(perimeter(case.outputs["mask"].bool()), rel=0.15)


def spread(values: Tensor) -> float:
    return float(values.double().std() / math.sqrt(len(values)))


def perimeter(mask: Tensor) -> float:
    """Edges between masked and visible patches, per masked patch: small for blocks, about 2.6 for random patches."""
    edges = (mask[:, 1:] != mask[:, :-1]).sum() + (mask[:, :, 1:] != mask[:, :, :-1]).sum()
    return float(edges / mask.sum())


def test_the_first_block_is_a_rectangle_that_is_smaller_than_the_grid() -> None:
    found = block_mask(numbers(500, 1, 4), torch.full((500,), 40.0), (8, 6), smallest=4).view(500, 8, 6)
    height, width = found.any(2).sum(1), found.any(1).sum(1)
    assert torch.equal(found.sum((1, 2)), height * width)
    assert height.max() < 8
    assert width.max() < 6
    assert found.any(0).all()  # every patch is masked in some image


def test_a_block_is_not_larger_than_the_maximum() -> None:
    found = block_mask(numbers(500, 1, 4), torch.full((500,), 60.0), (10, 10), smallest=4, largest=9)
    assert found.sum(1).max() == 9


def test_an_exact_count_adds_or_removes_random_patches() -> None:
    mask = block_mask(numbers(50, BLOCKS, 4), torch.full((50,), 20.0), (8, 8), smallest=4)
    more, fewer = (with_exact_count(mask, count, numbers(50, 64, seed=1)) for count in (30, 10))
    assert more.sum(1).tolist() == [30] * 50
    assert fewer.sum(1).tolist() == [10] * 50
    assert (mask <= more).all()
    assert (fewer <= mask).all()
    counts = torch.arange(50)[:, None]
    assert torch.equal(with_exact_count(mask, counts, numbers(50, 64)).sum(1), counts[:, 0])


@golden_cases("capi_masks")
def test_inverse_block_masks_have_the_properties_of_capi(case: Case) -> None:
    grid = (case.params["height"], case.params["width"])
    found = inverse_block_mask(numbers(500, 3), grid, ratio=case.params["mask_ratio"]).unflatten(1, grid)
    official = case.outputs["mask"].flatten(0, 1).bool()
    assert set(found.sum((1, 2)).tolist()) == set(case.outputs["count"].flatten().tolist()) == {127}
    sides = []
    for masks_of in (found, official):
        visible = ~masks_of
        height, width = visible.any(2).sum(1), visible.any(1).sum(1)
        assert ((height * width - visible.sum((1, 2))) < width).all()  # one block; its last row may be incomplete
        sides.append((int(height.min()), int(height.max()), int(width.min()), int(width.max())))
    assert sides[0][0] <= sides[1][0] <= sides[1][1] <= sides[0][1]
    assert sides[0] == (6, 12, 6, 12)  # aspect ratios of 1/2 to 2 at 69 visible patches
    assert (~found).float().mean(0).aminmax() == (pytest.approx(0.35, abs=0.09), pytest.approx(0.35, abs=0.09))


@golden_cases("ijepa_block_size")
def test_block_sizes_are_those_of_ijepa(case: Case) -> None:
    p = case.params
    side = p["image"] // p["patch"]
    for u, target, context in zip(*(case.tensors[n].tolist() for n in ("u", "pred_size", "enc_size")), strict=True):
        assert block_size(u, (side, side), scale=p["pred_scale"], aspect=p["aspect"]) == tuple(target)
        assert block_size(u, (side, side), scale=p["enc_scale"], aspect=(1.0, 1.0)) == tuple(context)


@golden_cases("ijepa_masks")
def test_multiblock_masks_have_the_properties_of_ijepa(case: Case) -> None:
    p = case.params
    side, generator = p["image"] // p["patch"], Noise()
    sizes = set()
    for _ in range(20):
        found = multiblock_masks(generator, 6, (side, side), device=CPU)
        check_multiblock(found, side, min_context=p["min_keep"])
        sizes.add((found.context.shape[1], found.targets.shape[2]))
    assert len(sizes) > 10
    for step, keep in enumerate(case.outputs["keep_pred"].tolist()):  # the same properties of the official masks
        context = case.outputs["masks_enc"][step, 0, :, : case.outputs["keep_enc"][step]]
        check_multiblock(
            masks.MultiBlock(context, case.outputs["masks_pred"][step, :, :, :keep]), side, min_context=p["min_keep"]
        )
    assert min(size for _, size in sizes) >= 29  # .15 * 196
    assert max(size for _, size in sizes) <= 42  # .2 * 196, rounded up


def check_multiblock(found: masks.MultiBlock, side: int, *, min_context: int) -> None:
    (num_targets, images, size), smallest = found.targets.shape, found.context.shape[1]
    assert found.context.shape[0] == images
    assert smallest > min_context
    assert (found.context.diff(dim=1) > 0).all()
    assert max(int(index.max()) for index in (found.context // side, found.targets // side)) < side - 1
    assert max(int(index.max()) for index in (found.context % side, found.targets % side)) < side - 1
    for image in range(images):
        for block in found.targets[:, image]:
            assert not set(block.tolist()) & set(found.context[image].tolist())
            row, column = block // side, block % side
            height, width = (int(each.max() - each.min()) + 1 for each in (row, column))
            assert height * width == size == len(set(block.tolist()))
    assert num_targets == 4


def test_small_grids_leave_enough_context() -> None:
    generator = Noise()
    smallest = [multiblock_masks(generator, 64, (8, 8), device=CPU).context.shape[1] for _ in range(20)]
    assert min(smallest) > 10


def test_the_context_is_the_largest_of_all_draws_where_none_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = {}
    for draws in (1, 4):
        monkeypatch.setattr(masks, "DRAWS", draws)
        generator = Noise()
        generator.set_extra_state(torch.tensor([1, 0]))
        contexts[draws] = multiblock_masks(generator, 64, (6, 6), device=CPU, min_context=36).context.shape[1]
    assert contexts[4] > contexts[1] > 0


@golden_cases("ijepa_apply_masks")
def test_patches_are_gathered_mask_by_mask(case: Case) -> None:
    x = case.inputs
    case.check(take_patches(x["x"], x["masks"]), "out")
    assert torch.equal(take_patches(x["x"], x["masks"][1]), case.outputs["out"][2:4])


def test_ratios_are_spread_evenly_over_the_global_batch() -> None:
    found = spread_ratios(Noise(), 40, low=0.1, high=0.5, fraction=0.5, device=CPU)
    assert int((found == 0).sum()) == 20
    parts = ((found[found > 0].sort().values - 0.1) / 0.4 * 20).floor()
    assert parts.tolist() == list(range(20))
    places = (found[found > 0] - 0.1) / 0.4 * 20 % 1  # within its part
    assert places.min() < 0.2
    assert places.max() > 0.8
    assert not torch.equal(found, spread_ratios(Noise(), 40, low=0.1, high=0.5, fraction=0.5, device=CPU))
    assert not spread_ratios(Noise(), 3, low=0.1, high=0.5, fraction=0.0, device=CPU).any()


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.5), (0.25, 0.75)])
@pytest.mark.parametrize("processes", [1, 8])
def test_the_limit_of_spread_ratios_is_not_exceeded_and_is_tight(
    monkeypatch: pytest.MonkeyPatch, fraction: float, low: float, high: float, processes: int
) -> None:
    generator, found = Noise(), []
    options = {"low": low, "high": high, "fraction": fraction}
    monkeypatch.setattr(noise, "world_size", lambda: processes)
    monkeypatch.setattr(masks, "world_size", lambda: processes)
    for _ in range(200):
        ratios = spread_ratios(generator, 64, device=CPU, **options)
        found.append(int((ratios * 256).floor().sum()))
    limit = spread_limit(64, 256, **options)
    assert max(found) <= limit
    if processes == 1:  # a target is rounded down, and a ratio is anywhere in its part of the range
        assert limit <= min(found) + 64 * fraction + (high - low) * 256
    else:
        assert limit <= 1.6 * max(found)


def drawn(generator: Noise, images: int) -> list[Tensor]:
    """Rows of two draws of all masks for the images of this process; the images are the first dimension."""
    found = []
    for _ in range(2):
        found.append(spread_ratios(generator, images, low=0.1, high=0.5, fraction=0.5, device=CPU))
        found.append(random_mask(generator.uniform(images, 36, device=CPU), 0.75).keep)
        found.append(block_mask(generator.uniform(images, BLOCKS, 4, device=CPU), 36 * found[0], (6, 6), smallest=4))
        context, targets = multiblock_masks(generator, images, (6, 6), device=CPU)
        found += [context, *targets]
    return found


def test_masks_are_the_same_for_any_number_of_processes_and_after_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Noise()
    drawn(generator, 8)
    state = generator.get_extra_state()
    whole, parts = drawn(generator, 8), []
    for rank in range(4):
        resumed = Noise()
        resumed.set_extra_state(state)
        for module in (masks, noise):
            monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "world_size", lambda: 4)
        parts.append(drawn(resumed, 2))
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(several))
