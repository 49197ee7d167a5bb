from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import Case, golden_cases
from learnable import Colors
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.knn import Knn, KnnFull, knn, query_positions


def problem(n: int = 60, m: int = 25, d: int = 6, c: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(n, d, generator=g),
        torch.randint(c, (n,), generator=g),
        torch.randn(m, d, generator=g),
        torch.randint(c, (m,), generator=g),
    )


@golden_cases("knn")
def test_votes_predictions_and_accuracies_equal_the_published_values(case: Case) -> None:
    names = ("train_features", "train_labels", "test_features", "test_labels")
    for k in case.params["k"]:
        found = knn(
            *(case.inputs[name] for name in names),
            k=k,
            temperature=case.params["temperature"],
            num_classes=case.params["classes"],
            chunk=7,
        )
        assert torch.equal(found.predictions, case.outputs[f"pred_k{k}"])
        case.check(found.votes, f"scores_k{k}")
        assert 100 * found.top1 == pytest.approx(float(case.outputs[f"top1_k{k}"]), abs=1e-4)
        assert 100 * found.top5 == pytest.approx(float(case.outputs[f"top5_k{k}"]), abs=1e-4)


def test_equals_a_loop_over_queries_and_neighbors():
    train, labels, query, query_labels = problem()
    found = knn(train.double(), labels, query.double(), query_labels, k=9, temperature=0.1, num_classes=4, chunk=4)
    for row, votes in zip(query.double(), found.votes, strict=True):
        cosines = sorted(((float(F.cosine_similarity(row, b, dim=0)), i) for i, b in enumerate(train.double())))
        want = torch.zeros(4, dtype=torch.float64)
        for cosine, i in cosines[-9:]:
            want[labels[i]] += torch.tensor(cosine / 0.1, dtype=torch.float64).exp()
        torch.testing.assert_close(votes, want / want.sum())


def test_one_neighbor_gives_the_label_of_the_most_similar():
    train, labels, query, query_labels = problem()
    nearest = (F.normalize(query, dim=1) @ F.normalize(train, dim=1).T).argmax(dim=1)
    found = knn(train, labels, query, query_labels, k=1, num_classes=4)
    assert torch.equal(found.predictions, labels[nearest])


def test_infinite_temperature_is_a_majority_vote():
    train, labels, query, query_labels = problem()
    near = (F.normalize(query, dim=1) @ F.normalize(train, dim=1).T).topk(15, dim=1).indices
    counts = F.one_hot(labels[near], 4).sum(dim=1)
    found = knn(train, labels, query, query_labels, k=15, temperature=1e9, num_classes=4)
    torch.testing.assert_close(found.votes, counts / 15.0)


def test_scaling_features_changes_nothing():
    train, labels, query, query_labels = problem()
    one = knn(train, labels, query, query_labels, k=20, num_classes=4)
    two = knn(train * 64, labels, query / 8, query_labels, k=20, num_classes=4)
    assert torch.equal(one.votes, two.votes)


def test_chunks_do_not_change_the_result():
    train, labels, query, query_labels = problem()
    one = knn(train, labels, query, query_labels, num_classes=4, chunk=1)
    torch.testing.assert_close(one.votes, knn(train, labels, query, query_labels, num_classes=4).votes)


def test_k_above_the_bank_means_the_whole_bank():
    train, labels, query, query_labels = problem()
    one = knn(train, labels, query, query_labels, k=10_000, num_classes=4)
    assert torch.equal(one.votes, knn(train, labels, query, query_labels, k=60, num_classes=4).votes)


def test_equal_votes_go_to_the_lowest_class():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = knn(
        train, torch.tensor([2, 1]), torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 1, 2]), k=2, num_classes=3
    )
    assert found.predictions.tolist() == [1, 1, 1]
    assert found.correct.tolist() == [False, True, False]


def test_top5_of_few_classes_is_1():
    assert knn(*problem(), num_classes=4).top5 == 1.0


def test_a_class_without_a_vote_is_not_among_the_best_five():
    bank, labels = torch.eye(10), torch.arange(10)
    found = knn(bank, labels, bank[9:].repeat(10, 1), labels, k=1, num_classes=10)
    assert (found.top1, found.top5) == (0.1, 0.1)
    found = knn(bank[:3], labels[:3], bank[:1].repeat(4, 1), torch.arange(4), k=3, num_classes=4)
    assert (found.top1, found.top5) == (0.25, 0.75)  # the fourth class has no image in the bank


def test_a_vote_that_underflows_is_still_a_vote():
    bank = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    labels, query = torch.tensor([7, 8]), torch.tensor([[1.0, 0.0]])
    found = knn(bank, labels, query, torch.tensor([8]), k=2, temperature=1e-3, num_classes=10)
    assert float(found.votes[0, 8]) == 0.0
    assert (found.top1, found.top5) == (0.0, 1.0)


def test_a_very_small_temperature_does_not_overflow():
    votes = knn(*problem(), num_classes=4, temperature=1e-4).votes
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(25))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 0}, "k=0"), ({"temperature": 0.0}, "temperature=0"), ({"chunk": 0}, "chunk=0")],
)
def test_values_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        knn(*problem(), num_classes=4, **change)
    with pytest.raises(ValueError, match=message):
        Knn(**change)


def test_unlabeled_or_unknown_classes_are_refused():
    train, labels, query, query_labels = problem()
    with pytest.raises(ValueError, match="unlabeled"):
        knn(train, labels.index_fill(0, torch.tensor([5]), -1), query, query_labels, num_classes=4)
    with pytest.raises(ValueError, match=r"must be in \[0, 3\)"):
        knn(train, labels, query, query_labels, num_classes=3)


def test_protocol_watches_val_and_reports_test_besides():
    train, labels, query, query_labels = problem()
    both = FeatureSet(
        train=train,
        train_labels=labels,
        val=query[:10],
        val_labels=query_labels[:10],
        test=query[10:],
        test_labels=query_labels[10:],
        num_classes=4,
    )
    result = json.loads(json.dumps(Knn(k=5).measure(both)))
    assert result["split"] == "val"
    assert result["top1"] == knn(train, labels, query[:10], query_labels[:10], k=5, num_classes=4).top1
    assert result["test_top1"] == knn(train, labels, query[10:], query_labels[10:], k=5, num_classes=4).top1
    assert (result["n_train"], result["n_test"], result["k"]) == (60, 10, 5)
    assert result["interval"][0] <= result["top1"] <= result["interval"][1]

    only_test = Knn(k=5).measure(replace(both, val=None, val_labels=None))
    assert (only_test["split"], only_test["top1"]) == ("test", result["test_top1"])
    assert "test_top1" not in Knn(k=5).measure(replace(both, test=both.val, test_labels=both.val_labels))


def test_the_full_bank_has_val_too_and_reports_test_alone():
    source = Colors()
    source.splits |= {"train": torch.arange(50), "val": torch.arange(50, 60)}  # val is not pre-trained on
    protocol = KnnFull()
    assert protocol.training_positions(source, {"knn_images": 20}).tolist() == list(range(60))
    assert protocol.reported_splits(source.nonempty_splits()) == ("test",)
    source.splits["train"] = torch.arange(60)
    assert protocol.training_positions(source, {}).tolist() == list(range(60))
    del source.splits["test"]
    assert protocol.training_positions(source, {}).tolist() == list(range(50))
    assert protocol.reported_splits(source.nonempty_splits()) == ("val",)


def test_the_full_bank_has_the_settings_of_publications_whatever_the_monitor():
    monitor = {"knn_k": 20, "knn_temperature": 0.5}
    assert KnnFull.defaults(monitor) == {"k": 200, "temperature": 0.1}
    assert KnnFull().variant(monitor) == ""
    assert KnnFull(k=20, temperature=0.07, seed=3).variant(monitor) == "k-20_temperature-0.07"
    train, labels, query, query_labels = problem()
    both = FeatureSet(
        train=train,
        train_labels=labels,
        val=query[:10],
        val_labels=query_labels[:10],
        test=query[10:],
        test_labels=query_labels[10:],
        num_classes=4,
    )
    result = KnnFull(k=5).measure(both)
    assert (result["protocol"], result["split"], result["n_test"]) == ("knn_full", "test", 15)
    expected = knn(train, labels, query[10:], query_labels[10:], k=5, temperature=0.1, num_classes=4)
    assert result["top1"] == expected.top1
    assert "test_top1" not in result


def test_descriptions_name_bank_and_queries():
    result = {"k": 200, "temperature": 0.1, "n_train": 50_000, "n_test": 10_000, "split": "test"}
    used = "k-NN (k 200, temperature 0.1) with a bank of 50,000 training images, measured on 10,000 images of test: "
    assert KnnFull().description(result).startswith(used + "comparable with published k-NN accuracies")
    assert (
        Knn().description(result).startswith(used + "comparable with the k-NN accuracy during training; publications")
    )
    assert "protocol=knn_full" in Knn().description(result)
    assert "except" in KnnFull().description(result | {"split": "val"})


class Labeled:
    """Positions 100 to 399 in the split val: class 0 has 200 images, class 1 has 80, class 2 has 10, 10 have none."""

    def __init__(self) -> None:
        self.labels = torch.tensor([3] * 100 + [0] * 200 + [1] * 80 + [2] * 10 + [-1] * 10)
        self.splits = {"val": torch.arange(100, 400)}


def test_queries_keep_the_fractions_of_the_classes_and_smaller_selections_are_part_of_larger_ones():
    source = Labeled()
    found = query_positions(source, "val", 29)
    assert torch.equal(found, found.sort().values)
    assert torch.bincount(source.labels[found]).tolist() == [20, 8, 1]
    assert torch.equal(found, query_positions(source, "val", 29))
    larger = query_positions(source, "val", 58)
    assert torch.bincount(source.labels[larger]).tolist() == [40, 16, 2]
    assert torch.isin(found, larger).all()
    assert not torch.equal(found, source.splits["val"][:29])
    assert len(query_positions(source, "val", 1)) == 1
    for limit in (None, 290, 1000):
        assert torch.equal(query_positions(source, "val", limit), source.splits["val"])


def test_the_protocol_has_the_queries_of_the_monitor_in_its_split_only():
    source = Labeled()
    source.splits = {"val": source.splits["val"], "test": torch.arange(100, 390)}
    for monitor, val, test in (
        ({"knn_queries": 29}, 29, 290),
        ({"knn_queries": 29, "knn_split": "test"}, 300, 29),
        ({}, 300, 290),
    ):
        assert len(Knn().query_positions(source, "val", monitor)) == val
        assert len(Knn().query_positions(source, "test", monitor)) == test
        assert len(KnnFull().query_positions(source, "val", monitor)) == 300
