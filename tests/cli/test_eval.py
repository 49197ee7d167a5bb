"""ssl-eval from the command line to the result file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import SMALL, Cli, installed
from small_runs import make_folder
from sslcli.data.sources.files import Folder
from sslcli.engine import precision
from sslcli.errors import ConfigError
from sslcli.runs.evaluation import check_home

FAST = ["protocol.epochs=2", "protocol.lrs=[0.1,1.0]", "protocol.weight_decays=[0.0,1e-4]"]
OTHER = ["dataset=shapes", "dataset.seed=1", "dataset.limit=150", "dataset.test_images=80"]


@pytest.fixture
def trained(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to evaluate."""
    return Path(shutil.copytree(run_dir, tmp_path / "trained", symlinks=True))


def result(home: Path, name: str) -> dict[str, Any]:
    (path,) = home.glob(f"{name}.json")  # a digest of images is given as ?
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def test_knn_is_the_monitors_last_number(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn")
    assert (ended.code, ended.err) == (0, "")
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    knn = result(trained / "eval", "knn")
    assert (knn["top1"], knn["top5"]) == (last["monitor/knn_top1"], last["monitor/knn_top5"])
    assert knn["k"] == 10  # of the run's monitor
    assert 0 <= knn["test_top1"] <= 1


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
    low, high = linear["interval"]
    assert low <= linear["top1"] <= high
    assert linear["top1"] <= linear["top5"]
    for name in ("random", "pixels"):
        baseline = linear["baselines"][name]
        assert baseline["interval"][0] <= baseline["top1"] <= baseline["interval"][1]
        assert f"{100 * baseline['top1']:.1f} %" in ended.out
    assert f"{100 * linear['top1']:.1f} %" in ended.out
    assert str(trained / "eval") in ended.out


def test_features_are_extracted_once(trained: Path, cli: Cli) -> None:
    cli("ssl-eval", f"run={trained}", *FAST)
    first = result(trained / "eval", "linear")
    times = {path: path.stat().st_mtime_ns for path in (trained / "eval/features").iterdir()}
    kinds = sorted(path.name.rpartition("_")[0] + path.suffix for path in times)
    assert kinds == ["pixels_linear.json", "random.pt", "random_linear.json", "trained.pt"]
    ended = cli("ssl-eval", f"run={trained}", *FAST)
    assert "features," not in ended.out
    assert {path: path.stat().st_mtime_ns for path in (trained / "eval/features").iterdir()} == times
    second = result(trained / "eval", "linear")
    clock = {"seconds": 0}
    assert second | clock == first | clock
    cli("ssl-eval", f"run={trained}", *FAST, "cache=false")
    assert result(trained / "eval", "linear")["top1"] == first["top1"]


def test_a_run_directory_that_cannot_be_written_is_refused_before_anything_is_computed(
    trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained / "eval").write_text("in the way")
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn")
    assert ended.code == 2
    assert f"{trained / 'eval'} is a file, but it must be a folder: remove it" in ended.err
    assert ended.err.count("\n") == 1
    assert "features," not in ended.out
    with pytest.raises(ConfigError, match=r"results go to .*, which cannot be written"):
        check_home(trained / "eval" / "below")
    (trained / "eval").unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sslcli.system.atomic.replace", fail)
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    assert ended.code == 3
    assert ended.err.strip().endswith("knn.json cannot be written: No space left on device")


def test_another_data_set_has_a_result_of_its_own(trained: Path, cli: Cli, tmp_path: Path) -> None:
    cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    own = result(trained / "eval", "knn")
    make_folder(tmp_path / "images", broken=0)
    line = ["dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.image_size=32", "dataset.workers=0"]
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false", *line)
    assert (ended.code, ended.err) == (0, "")
    other = result(trained / "eval", "knn_images-??????")
    assert (other["dataset"], other["pretrained_on"], other["num_classes"]) == ("images", "shapes", 2)
    assert other["dataset_fingerprint"] != own["dataset_fingerprint"]
    assert result(trained / "eval", "knn") == own


def test_sets_whose_folders_are_called_alike_have_results_of_their_own(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    line = [f"run={trained}", "protocol=knn", "baselines=false", "dataset=folder", "dataset.workers=0"]
    for parent, change in (("my", 0), ("other", 255)):
        root = make_folder(tmp_path / parent / "train.v2", per_class=15, broken=0)
        for path in sorted(root.glob("*/*.png")):  # files of the same names and sizes in both
            pixels = torch.from_numpy(np.array(Image.open(path))) ^ change
            Image.fromarray(pixels.numpy()).save(path.with_suffix(".bmp"))
            path.unlink()
        for extra in (
            ["dataset.image_size=32"],
            ["dataset.image_size=32", "dataset.limit=20"],
            ["dataset.image_size=16"],
        ):
            ended = cli("ssl-eval", *line, f"dataset.root={root}", *extra)
            assert (ended.code, ended.err) == (0, "")
    found = {path.stem: json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")}
    prints = {one["dataset_version"][:6] for one in found.values()}
    names = (f"knn_train.v2-{digits}{end}" for digits in prints for end in ("", "_limit-20", "_16px"))
    assert len(prints) == 2
    assert sorted(found) == sorted(names)
    assert {one["image_size"] for name, one in found.items() if name.endswith("_16px")} == {16}
    assert all(name in ended.out for name in found)  # the table has them all


def test_what_makes_numbers_incomparable_is_in_the_name_of_the_result(trained: Path, cli: Cli) -> None:
    home = trained / "eval"
    line = [f"run={trained}", "baselines=false"]
    home.mkdir(exist_ok=True)
    for extra in ([], ["protocol.k=3"], ["protocol.temperature=0.1"], ["protocol.k=10"], ["checkpoint=3"]):
        assert cli("ssl-eval", *line, "protocol=knn", *extra).code == 0
    names = {"knn", "knn_k-3", "knn_temperature-0.1", "knn_step-3"}
    for extra in (["protocol.fraction=0.05"], ["protocol.labels_per_class=2"], ["protocol.fraction=0.1"]):
        assert cli("ssl-eval", *line, "protocol=semi", *QUICK, "protocol.seeds=1", *extra).code == 0
    semi = {"semi_5pct", "semi_2-per-class", "semi_10pct"}
    assert {path.stem for path in home.glob("*.json")} == names | semi
    assert {path.parent.name for path in home.glob("*/net.pt")} == semi
    assert result(home, "semi_5pct")["measured"] == "semi_5pct"

    distill = [*line, "protocol=distill", "protocol.steps=2"]
    ended = cli("ssl-eval", *distill, "protocol.teacher=semi")
    assert ended.code == 2
    assert "protocol.teacher is 'semi', which may be any of: semi_10pct, semi_2-per-class, semi_5pct" in ended.err
    assert cli("ssl-eval", *distill, "protocol.teacher=semi_5pct").code == 0
    taught = result(home, "distill_semi_5pct")["teacher"]
    assert (taught["measured"], taught["net"]) == ("semi_5pct", "semi_5pct/net.pt")
    for name in ("semi_10pct", "semi_2-per-class"):
        (home / f"{name}.json").unlink()
    student = "protocol.student={_target_: sslcli.backbones.small.Small, image_size: 32, width: 4}"
    ended = cli("ssl-eval", *distill, "protocol.teacher=semi", student)
    assert (ended.code, ended.err) == (0, "")
    assert result(home, "distill_semi_5pct_student-Small-??????")["student"] == "Small"


def test_results_of_before_stay_in_the_table_and_files_without_one_do_not_end_it(trained: Path, cli: Cli) -> None:
    assert cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false").code == 0
    old = result(trained / "eval", "knn")
    del old["measured"]
    (trained / "eval/semi.json").write_text(json.dumps(old | {"protocol": "semi"}))
    (trained / "eval/linear_other.json").write_text("{}")
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    assert "semi (val)" in ended.out
    assert "linear_other.json holds no result" in ended.out.replace("\n", " ")


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
    assert f"of the images of val {lost} of {len(labels)} are of classes that no training image has" in ended.out


def test_images_cut_short_are_named_and_left_out_up_to_a_share(trained: Path, cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", broken=3)
    line = [f"run={trained}", "dataset=folder", f"dataset.root={tmp_path / 'images'}", "dataset.image_size=32"]
    line += ["dataset.workers=0", "dataset.val_fraction=0.5", "baselines=false"]
    ended = cli("ssl-eval", *line, "protocol=knn")
    assert ended.code == 2
    assert "dataset.max_bad=0.01 allows" in ended.err
    assert "images/a/00" in ended.err
    for protocol in (["protocol=knn"], ["protocol=semi", *QUICK, "protocol.labels_per_class=5"]):
        ended = cli("ssl-eval", *line, *protocol, "dataset.max_bad=0.2")
        assert (ended.code, ended.err) == (0, "")
        assert "cannot be read and are left out: " in ended.out
    found = result(trained / "eval", "knn_images-??????_val-0.5")
    assert found["n_train"] + found["n_test"] == 57


@pytest.mark.parametrize("protocol", ["linear", "finetune", "utility"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_an_evaluation_that_a_signal_stops_says_so_and_can_be_started_again(
    protocol: str, number: signal.Signals, code: int, trained: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started to ignore it
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    line = [f"run={trained}", f"protocol={protocol}", *(FAST if protocol == "linear" else QUICK)]
    line += ["protocol.seeds=1", "protocol.points=2"] if protocol == "utility" else []
    at = ("sslcli.evaluation.linear.fit_sgd", "sslcli.evaluation.training.Progress.__call__")[protocol != "linear"]

    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr(at, killed)
        ended = cli("ssl-eval", *line)
    assert ended.code == code
    assert ended.err.count("\n") == 1
    assert (f"stopped by {number.name}" if code == 75 else "interrupted") in ended.err
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not list((trained / "eval").glob("*.json"))
    left = list((trained / "eval").rglob(".*"))
    ended = cli("ssl-eval", *line)
    assert (ended.code, ended.err, left) == (0, "", [])
    assert "features, trained" not in ended.out
    name = "utility_2-points" if protocol == "utility" else protocol
    assert result(trained / "eval", name)["protocol"] == protocol


def test_other_images_of_the_same_name_do_not_replace_a_result(trained: Path, cli: Cli) -> None:
    cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    own = result(trained / "eval", "knn")
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false", *OTHER)
    assert (ended.code, ended.err) == (0, "")
    assert result(trained / "eval", "knn") == own
    results = [json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")]
    assert len({found["dataset_fingerprint"] for found in results}) == len(results) == 2


@pytest.fixture
def weights(trained: Path, tmp_path: Path) -> Path:
    """The backbone of a run as a file of its own."""
    state = torch.load(trained / "checkpoints/last", weights_only=True)["method"]
    path = tmp_path / "net.pt"
    torch.save({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}, path)
    return path


def test_a_bare_backbone_is_measured(weights: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"weights={weights}", "backbone=small", *OTHER, "protocol=knn")
    assert (ended.code, ended.err) == (0, "")
    found = result(weights.with_name("net.pt.eval"), "knn_shapes-*")
    assert found["weights"] == str(weights)
    assert found["checkpoint_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"random", "pixels"} == found["baselines"].keys()


def test_a_backbone_whose_keys_do_not_all_match_is_refused_with_their_names(weights: Path, cli: Cli) -> None:
    line = [f"weights={weights}", *OTHER, "protocol=knn"]
    state = torch.load(weights, weights_only=True)
    torch.save({f"module.{key}": value for key, value in state.items()}, weights)
    ended = cli("ssl-eval", *line, "backbone=small")
    assert ended.code == 2
    assert "block1.0.weight" in ended.err
    assert "module.block1.0.weight" in ended.err
    torch.save(state, weights)
    ended = cli("ssl-eval", *line, "backbone=small", "backbone.width=16")
    assert ended.code == 2
    assert "block1.0.weight is (32, 3, 3, 3) and should be (16, 3, 3, 3)" in ended.err
    assert not list(weights.with_name("net.pt.eval").glob("*.json"))


def test_weights_need_a_backbone_and_a_data_set(weights: Path, cli: Cli) -> None:
    assert "needs backbone=..." in cli("ssl-eval", f"weights={weights}", *OTHER).err
    ended = cli("ssl-eval", f"weights={weights}", "backbone=resnet18", "backbone.image_size=32")
    assert ended.code == 2
    assert "needs dataset=..." in ended.err


QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def test_a_fine_tuned_net_is_kept_and_teaches_a_student(trained: Path, cli: Cli) -> None:
    line = [f"run={trained}", "protocol=distill", "protocol.steps=2"]
    ended = cli("ssl-eval", *line)
    assert ended.code == 2
    assert "protocol=finetune" in ended.err
    checkpoint = (trained / "checkpoints/step-00000003.pt").read_bytes()
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    assert (ended.code, ended.err) == (0, "")
    tuned = result(trained / "eval", "finetune")
    assert (trained / "checkpoints/step-00000003.pt").read_bytes() == checkpoint
    kept = trained / "eval" / tuned["net"]
    assert tuned["net_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert tuned["checkpoint_sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert tuned["baselines"].keys() == {"random"}
    assert (tuned["feature_layer"], tuned["n_train"], tuned["n_test"]) == ("backbone", 200, 100)
    for arm in (tuned, tuned["baselines"]["random"]):
        assert f"{100 * arm['top1']:.1f} %" in ended.out
    student = "protocol.student={_target_: sslcli.backbones.small.Small, image_size: 32, width: 4}"
    for extra, name in (([], "distill"), ([student], "distill_student-Small-??????")):
        ended = cli("ssl-eval", *line, *extra)
        assert (ended.code, ended.err) == (0, "")
        taught = result(trained / "eval", name)
        assert taught["teacher"]["sha256"] == tuned["net_sha256"]
        assert taught["teacher"]["top1"] == tuned["top1"]
        assert f"teacher (200 labels): {100 * tuned['top1']:.1f} %" in ended.out
    assert taught["student"] == "Small"
    ended = cli("ssl-eval", *line, student.replace("width: 4", "in_channels: 1"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "Small does not take images of shape (2, 3, 32, 32)" in ended.err
    ended = cli("ssl-eval", f"run={trained}", "protocol=finetune", *QUICK)
    clock = {"seconds": 0}
    assert result(trained / "eval", "finetune") | clock == tuned | clock
    assert kept.read_bytes()


def test_few_labels_and_the_labels_saved_are_measured(trained: Path, cli: Cli) -> None:
    ended = cli("ssl-eval", f"run={trained}", "protocol=semi", *QUICK, "protocol.labels_per_class=2")
    assert (ended.code, ended.err) == (0, "")
    semi = result(trained / "eval", "semi_2-per-class")
    assert (semi["n_train"], len(semi["runs"]), semi["protocol_settings"]["labels_per_class"]) == (20, 3, 2)
    probed = f"linear probe of the same 20 labels: trained {100 * semi['linear']['top1']:.1f} %"
    assert probed in ended.out
    line = ["protocol.smallest=20", "protocol.points=2", "protocol.seeds=1", "feature_layer=block3"]
    ended = cli("ssl-eval", f"run={trained}", "protocol=utility", *QUICK, *line)
    assert (ended.code, ended.err) == (0, "")
    utility = result(trained / "eval", "utility_from-20_2-points_block3")
    assert utility["feature_layer"] == "block3"
    assert [point["labels"] for point in utility["curve"]] == [19, 200]
    for point in utility["curve"]:
        assert f"{point['utility']:.2f} " in ended.out
    assert (trained / "eval/utility_from-20_2-points_block3/utility.svg").read_text().startswith("<svg")
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
    assert found["n_train"] == 192  # the first epoch left out 8 of 200 images, which have no row
    assert "random" in found["baselines"]
    ended = cli("ssl-eval", f"run={run}", "protocol=finetune", "feature_layer=bank")
    assert (ended.code, "take protocol=knn or linear" in ended.err) == (2, True)
    ended = cli("ssl-eval", f"run={run}", "protocol=knn", "feature_layer=bank", *OTHER)
    assert (ended.code, "of the images of pre-training" in ended.err) == (2, True)


def test_a_long_name_is_whole_in_the_table_of_a_narrow_screen(
    trained: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "simclr_shapes_small_" + "0123456789abcdef" * 4 + "_the_end"
    shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    table = ended.out[ended.out.index("top-1") :]
    first = [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")]
    assert "".join(first) == name
    assert max(map(len, table.splitlines()[1:])) <= 80


def test_a_folder_of_runs_becomes_a_table(trained: Path, cli: Cli, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / "sweep" / name, symlinks=True)
    (tmp_path / "sweep/not_started").mkdir()
    ended = cli("ssl-eval", f"run={tmp_path / 'sweep'}", "protocol=knn", "baselines=false")
    assert (ended.code, ended.err) == (0, "")
    number = f"{100 * result(tmp_path / 'sweep/one/eval', 'knn')['top1']:.1f} %"
    rows = [line for line in ended.out.splitlines() if number in line]
    assert [name for name in ("one", "two") if any(name in row for row in rows)] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run={run} checkpoint=2", ["checkpoint is 2", "steps: 3"]),
        ("run={run} checkpoint=99999999999999", ["checkpoint is 99999999999999", "steps: 3"]),
        ("run=images", ["images is neither a run directory"]),
        ("run={run} device=cuda:77", ["device is 'cuda:77'"]),
        ("run={run} dataset=flat dataset.root=images", ["images", "no labels"]),
        ("run={run} dataset=folder dataset.root=single", ["single class, 'a'", "two or more"]),
        ("run={run} dataset=folder dataset.root=nowhere", ["dataset.root is ", "nowhere, but"]),
        ("run={run} protocol=knn protocol.k=0", ["k=0", "at least 1"]),
        ("run={run} protocol=finetune protocol.from_layer=1", ["protocol.from_layer is 1", "0 is the backbone"]),
        ("run={run} protocol=knn feature_layer=bank", ["'bank', which this net does not have", "It has: backbone"]),
        ("run={run} protocol=finetune protocol.from_layer=1 feature_layer=block1", ["block1", "from_layer 1"]),
        ("run={run} protocol=distill", ["there is no teacher 'finetune'", "protocol=finetune"]),
        ("run={run}s", ["no such path. Did you mean", "holds:"]),
        ("run={run} protocol=semi protocol.labels_per_class=500", ["labels_per_class is 500", "labeled training"]),
        ("weights=images/a/000.png backbone=small dataset=shapes dataset.limit=50", ["000.png"]),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_message(
    line: str, wanted: list[str], trained: Path, cli: Cli, tmp_path: Path
) -> None:
    make_folder(tmp_path / "images", per_class=4, broken=0)
    shutil.copytree(tmp_path / "images/a", tmp_path / "single/a")
    ended = cli("ssl-eval", *line.format(run=trained).split())
    assert ended.code == 2, ended
    assert [part for part in wanted if part not in ended.err] == [], ended.err
    assert ended.err.count("\n") == 1
    assert not list((trained / "eval").glob("*.json"))


def test_a_run_that_names_a_strange_class_is_refused(trained: Path, cli: Cli) -> None:
    path = trained / "config.yaml"
    path.write_text(path.read_text().replace("sslcli.backbones.small.Small", "os.system"))
    ended = cli("ssl-eval", f"run={trained}")
    assert ended.code == 2
    assert "os.system" in ended.err
    assert "trust" in ended.err


def test_the_installed_command_ends_with_a_table_and_the_place_of_the_results(trained: Path, tmp_path: Path) -> None:
    told = installed(tmp_path, "ssl-eval", f"run={trained}", "protocol=knn")
    for part in ("raw pixels", "random initialization", "trained", f"results: {trained / 'eval'}"):
        assert part in told
