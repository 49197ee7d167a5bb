"""Batches of features: bit-identical to ssl-eval, in the order of the splits, also after a restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from command_line import Cli
from small_runs import make_folder
from sslcli.errors import ConfigError
from sslcli.report.console import Screen
from sslcli.runs.embedding import Embedding, prepare
from sslcli.runs.encoder import network_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def embedding(run_dir: Path) -> Embedding:
    config = network_config(run_dir, batch_size=64)
    return prepare(config, CPU, Screen(silent=True), images=None, split="all")


def test_the_features_of_a_split_are_those_of_ssl_eval(trained: Path, embedding: Embedding, cli: Cli) -> None:
    assert cli("ssl-eval", f"run={trained}", "protocol=knn_full", "batch_size=64").code == 0
    (path,) = (trained / "eval" / "features").glob("trained_*.pt")
    stored = torch.load(path, weights_only=True)["tensors"]
    tested = replace(embedding, splits={"test": embedding.splits["test"]})
    found = [(torch.from_numpy(batch.features), torch.from_numpy(batch.positions)) for batch in tested.batches()]
    features, positions = map(torch.cat, zip(*found, strict=True))
    assert torch.equal(features, stored["test"].float())
    assert torch.equal(positions, stored["test_positions"])


def test_each_image_is_in_one_split(embedding: Embedding) -> None:
    positions = torch.cat(list(embedding.splits.values()))
    assert list(embedding.splits) == ["train", "val", "test"]
    assert torch.equal(positions.sort().values, embedding.source.used())
    assert len(positions) == embedding.total


def test_batches_continue_after_any_whole_batches(embedding: Embedding) -> None:
    whole, done = list(embedding.batches()), 0
    for number, batch in enumerate(whole):
        if number in (1, 3, 4, len(whole)):
            rest = next(embedding.batches(done))
            assert np.array_equal(rest.positions, batch.positions)
            assert np.array_equal(rest.features, batch.features)
        done += batch.images
    assert done == embedding.total
    assert not list(embedding.batches(done))


def test_unreadable_images_have_no_row_but_a_reason(run_dir: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos", per_class=5, broken=2)
    config = network_config(run_dir, batch_size=4)
    found = prepare(config, CPU, Screen(silent=True), images=[str(folder)], split="all")
    batches = list(found.batches())
    assert [batch.images for batch in batches] == [4, 4, 2]
    assert sum(len(batch.positions) for batch in batches) == 8
    bad = {path: why for batch in batches for path, why in batch.unreadable.items()}
    assert {Path(path).parent.name for path in bad} == {"a"}
    assert all(bad.values())


def test_the_identity_depends_on_all_that_changes_the_features(embedding: Embedding) -> None:
    config, subject, splits = embedding.config, embedding.subject, embedding.splits
    others = [
        replace(embedding, config=replace(config, batch_size=32)),
        replace(embedding, config=replace(config, feature_layer="block4")),
        replace(embedding, subject=replace(subject, precision="fp16")),
        replace(embedding, subject=replace(subject, provenance=subject.provenance | {"checkpoint_sha256": "0"})),
        replace(embedding, splits=splits | {"test": splits["test"][:-1]}),
        replace(embedding, splits={name: splits[name] for name in ("train", "val")}),
    ]
    assert len({embedding.identity(), *(other.identity() for other in others)}) == 7
    moved = replace(subject, provenance=subject.provenance | {"run": "/elsewhere"})
    assert replace(embedding, subject=moved).identity() == embedding.identity()


def test_layers_and_splits_that_do_not_exist_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="split is 'extra', but shapes has the splits: train, val, test"):
        prepare(network_config(run_dir), CPU, Screen(silent=True), images=None, split="extra")
    with pytest.raises(ValueError, match="feature_layer is 'block9'"):
        prepare(network_config(run_dir, feature_layer="block9"), CPU, Screen(silent=True), images=None, split="all")
