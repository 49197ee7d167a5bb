from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Case, golden_cases
from processes import Pair
from sslcli.nn import kmeans
from sslcli.nn.kmeans import nearest, spherical_kmeans


@golden_cases("deepclusterv2_kmeans")
def test_centroids_and_clusters_equal_the_official_code(case: Case) -> None:
    params, x = case.params, case.inputs
    seen = torch.zeros(params["dataset"], dtype=torch.bool).index_fill(0, x["index"], True)
    rows = x["bank"].new_zeros(params["banks"], params["dataset"], params["D"]).index_copy(1, x["index"], x["bank"])
    found = []
    for head, count in enumerate(params["prototypes"]):
        bank = head % params["banks"]
        first = x["bank"][bank, x[f"init{head}"][:count]]
        centroids, clusters = spherical_kmeans(rows[bank], seen, first, iterations=params["rounds"])
        case.check(centroids, f"centroids{head}")
        found.append(clusters.masked_fill(~seen, -100))
    case.check(found, "assignments")


def unit_rows(num_rows: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def objective(rows: Tensor, centroids: Tensor) -> float:
    return float((1 - (rows @ centroids.T).amax(1)).sum())


def test_the_objective_never_rises_and_clusters_are_those_of_a_search_over_all_centroids() -> None:
    rows, seen = unit_rows(60), torch.ones(60, dtype=torch.bool)
    values = []
    for iterations in range(6):
        centroids, clusters = spherical_kmeans(rows, seen, rows[:7], iterations=iterations)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(7, dtype=torch.float64))
        distances = (rows[:, None] - centroids).square().sum(2)
        assert clusters.tolist() == [min(range(7), key=lambda k, row=row: row[k]) for row in distances.tolist()]
        values.append(objective(rows, centroids))
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.5


def test_a_centroid_without_rows_stays_and_unused_rows_have_no_influence() -> None:
    rows, seen = unit_rows(20), torch.arange(20) < 12
    first = torch.cat([rows[:3], -F.normalize(rows[:12].sum(0, keepdim=True))])
    first[3] = 0  # the dot product with every row is 0
    rows[:12] = rows[:12].abs()  # so that every row has a positive dot product with the first three
    first[:3] = rows[:3]
    centroids, _ = spherical_kmeans(rows, seen, first, iterations=4)
    assert centroids[3].tolist() == [0, 0, 0, 0]
    expected, _ = spherical_kmeans(rows[:12], seen[:12], first, iterations=4)
    torch.testing.assert_close(centroids, expected)


def test_blocks_do_not_change_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(50)
    whole = nearest(rows, rows[:8])
    monkeypatch.setattr(kmeans, "BLOCK", 24)
    assert torch.equal(nearest(rows, rows[:8]), whole)


def clustered(num_rows: int) -> tuple[Tensor, Tensor]:
    rows = unit_rows(num_rows)
    return spherical_kmeans(rows, torch.arange(num_rows) % 5 > 0, rows[:6], iterations=5)


@pytest.mark.parametrize("num_rows", [40, 41])
def test_two_processes_find_the_clusters_of_one(num_rows: int, pair: Pair) -> None:
    centroids, clusters = clustered(num_rows)
    for found in pair.run(clustered, num_rows):
        torch.testing.assert_close(found[0], centroids, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[1], clusters)
