"""ssl-eval from the command line to the result file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from command_line import SMALL, Cli, installed, result
from small_runs import make_folder
from sslcli.data.sources.files import Folder
from sslcli.engine import precision

FAST = ["protocol.epochs=2", "protocol.lrs=[0.1,1.0]", "protocol.weight_decays=[0.0,1e-4]"]
OTHER = ["dataset=shapes", "dataset.seed=1", "dataset.limit=150", "dataset.test_images=80"]


def test_knn_is_the_monitors_last_number(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn")
    assert (ended.code, ended.err) == (0, "")
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    knn = result(trained / "eval", "knn")
    assert (knn["top1"], knn["top5"]) == (last["monitor/knn_top1"], last["monitor/knn_top5"])
    assert knn["k"] == 10  # of the run's monitor
    assert 0 <= knn["test_top1"] <= 1


def test_knn_of_publications_has_the_whole_training_set_as_bank(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn_full", "feature_layer=projection", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    found = result(trained / "eval", "knn_full_projection")
    assert (found["split"], found["n_train"], found["n_test"]) == ("test", 200, 100)
    assert (found["k"], found["temperature"]) == (200, 0.1)
    assert f"knn_full_projection: {found['description']}\n" in ended.out
    assert "bank of 200 training images, measured on 100 images of test: comparable with" in found["description"]


def test_the_linear_probe_writes_where_its_number_comes_from(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", *FAST)
    assert (ended.code, ended.err) == (0, "")
    linear = result(trained / "eval", "linear")
    checkpoint = trained / "checkpoints/step-00000003.pt"
    wanted = {
        "protocol": "linear",
        "split": "test",
        "n_test": 100,
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        "step": 3,
        "method": "sslcli.methods.simclr.SimCLR",
        "dataset": "shapes",
        "pretrained_on": "shapes",
        "pretraining_seed": 0,
        "precision": precision.resolve("auto", torch.device("cpu")),
        "feature_layer": "backbone",
        "seed": 0,
    }
    assert {key: linear[key] for key in wanted} == wanted
    assert {"transform", "dataset_fingerprint", "sslcli", "torch", "protocol_settings"} <= linear.keys()
    assert linear["protocol_settings"]["epochs"] == 2
    assert linear["description"] == (
        f"linear probe on cached features without augmentation, trained on {linear['n_train']} training images, "
        "measured on 100 images of test: the published protocol trains on random crops (protocol=linear_sgd), which "
        "can change the accuracy"
    )
    assert f"linear: {linear['description']}\n" in ended.out
    low, high = linear["interval"]
    assert low <= linear["top1"] <= high
    assert linear["top1"] <= linear["top5"]
    for name in ("random", "pixels"):
        baseline = linear["baselines"][name]
        assert baseline["interval"][0] <= baseline["top1"] <= baseline["interval"][1]
        assert f"{100 * baseline['top1']:.1f} %" in ended.out
    assert f"{100 * linear['top1']:.1f} %" in ended.out
    assert str(trained / "eval") in ended.out


def test_another_data_set_has_a_result_of_its_own(trained: Path, cli: Cli, tmp_path: Path) -> None:
    cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    own = result(trained / "eval", "knn")
    make_folder(tmp_path / "images", broken=0)
    line = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.image_size=32", "dataset.workers=0"]
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false", *line)
    assert (ended.code, ended.err) == (0, "")
    other = result(trained / "eval", "knn_images-??????_val-in-train")
    assert (other["dataset"], other["pretrained_on"], other["num_classes"]) == ("images", "shapes", 2)
    assert other["dataset_fingerprint"] != own["dataset_fingerprint"]
    assert result(trained / "eval", "knn") == own


def test_images_of_a_class_that_is_not_trained_on_are_counted(trained: Path, cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", per_class=10, broken=0)
    for name in ("c", "d"):
        shutil.copytree(tmp_path / "images/a", tmp_path / "images" / name)
        for path in sorted((tmp_path / "images" / name).iterdir())[1:]:
            path.unlink()
    line = [f"run={trained}", "dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.image_size=32"]
    line += ["dataset.workers=0", "dataset.val_fraction=0.8", "baselines=false"]
    ended = cli("ssl-eval", *line, "protocol=knn")
    assert (ended.code, ended.err) == (0, "")
    source = Folder(root=str(tmp_path / "images"), image_size=32, val_fraction=0.8, workers=0)
    bank, labels = set(source.labels[source.splits["train"]].tolist()), source.labels[source.splits["val"]].tolist()
    lost = sum(label not in bank for label in labels)
    assert lost >= 1
    assert f"of the images of val {lost} of {len(labels)} have classes that no training image has" in ended.out


QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def test_few_labels_and_the_labels_saved_are_measured(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", "protocol=semi", *QUICK, "protocol.labels_per_class=2")
    assert (ended.code, ended.err) == (0, "")
    semi = result(trained / "eval", "semi_2-per-class_steps-2")
    assert (semi["n_train"], len(semi["runs"]), semi["protocol_settings"]["labels_per_class"]) == (20, 3, 2)
    probed = f"linear probe of the same 20 labels: trained {100 * semi['linear']['top1']:.1f} %"
    assert probed in ended.out
    line = ["protocol.smallest=20", "protocol.points=2", "protocol.seeds=1", "feature_layer=block3"]
    ended = cli("ssl-eval", f"run={trained}", "protocol=utility", *QUICK, *line)
    assert (ended.code, ended.err) == (0, "")
    utility = result(trained / "eval", "utility_from-20_2-points_seeds-1_steps-2_inversion-linear_block3")
    assert utility["feature_layer"] == "block3"
    assert [point["labels"] for point in utility["curve"]] == [19, 200]
    for point in utility["curve"]:
        assert f"{point['utility']:.2f} " in ended.out
    assert (
        (trained / "eval/utility_from-20_2-points_seeds-1_steps-2_inversion-linear_block3/utility.svg")
        .read_text()
        .startswith("<svg")
    )
    ended = cli("ssl-eval", f"run={trained}", "protocol=utility", "baselines=false")
    assert ended.code == 2
    assert "baselines=true" in ended.err


def test_features_of_another_layer_are_another_number(trained: Path, cli: Cli) -> None:
    found = []
    for layer in ("backbone", "projection", "block1"):
        ended = cli("ssl-eval", f"run={trained}", "protocol=knn", f"feature_layer={layer}", "baselines=false")
        assert (ended.code, ended.err) == (0, "")
        found.append(result(trained / "eval", "knn" if layer == "backbone" else f"knn_{layer}"))
    assert [one["feature_layer"] for one in found] == ["backbone", "projection", "block1"]
    assert len(list((trained / "eval/features").iterdir())) == 3
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "feature_layer=blok1")
    assert ended.code == 2
    for part in ("blok1", "Did you mean 'block1'?", "projection", "block5"):
        assert part in ended.err


def test_the_rows_of_a_memory_bank_classify_in_place_of_fresh_features(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli("ssl-train", *SMALL, "method=memory_bank", "train.max_steps=6", f"run_dir={run}").code == 0
    ended = cli("ssl-eval", f"run={run}", "protocol=knn", "feature_layer=bank")
    assert (ended.code, ended.err) == (0, "")
    found = result(run / "eval", "knn_bank")
    assert found["feature_layer"] == "bank"
    # 180 images are not in val. The first epoch left out 8 of 200 images, 7 of these 180, which have no row.
    assert found["n_train"] == 173
    assert "random" in found["baselines"]
    ended = cli("ssl-eval", f"run={run}", "protocol=finetune", "feature_layer=bank")
    assert (ended.code, "use protocol=knn, knn_full or linear" in ended.err) == (2, True)
    ended = cli("ssl-eval", f"run={run}", "protocol=knn", "feature_layer=bank", *OTHER)
    assert (ended.code, "of the images of pre-training" in ended.err) == (2, True)


def test_the_installed_command_ends_with_a_table_and_the_place_of_the_results(trained: Path, tmp_path: Path) -> None:
    output = installed(tmp_path, "ssl-eval", f"run={trained}", "protocol=knn")
    for part in ("raw pixels", "random initialization", "trained", f"results: {trained / 'eval'}"):
        assert part in output
