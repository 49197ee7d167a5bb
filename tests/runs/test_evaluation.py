"""Names, places and cached features of an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from command_line import Cli, result
from processes import Pair
from small_runs import make_folder
from sslcli.distributed import collectives, shared_work
from sslcli.errors import ConfigError
from sslcli.runs.evaluation import Starts, check_results_dir

FAST = ["protocol.epochs=2", "protocol.lrs=[0.1,1.0]", "protocol.weight_decays=[0.0,1e-4]"]
OTHER = ["dataset=shapes", "dataset.seed=1", "dataset.limit=150", "dataset.test_images=80"]


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
        check_results_dir(trained / "eval" / "below")
    (trained / "eval").unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sslcli.system.atomic.replace", fail)
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    assert ended.code == 3
    assert ended.err.count("knn.json cannot be written: No space left on device") == 1


def test_what_makes_numbers_incomparable_is_in_the_name_of_the_result(trained: Path, cli: Cli) -> None:
    results_dir = trained / "eval"
    line = [f"run={trained}", "baselines=false"]
    results_dir.mkdir(exist_ok=True)
    for extra in ([], ["protocol.k=3"], ["protocol.temperature=0.1"], ["protocol.k=10"], ["checkpoint=3"]):
        assert cli("ssl-eval", *line, "protocol=knn", *extra).code == 0
    names = {"knn", "knn_k-3", "knn_temperature-0.1", "knn_step-3"}
    for extra in (["protocol.fraction=0.05"], ["protocol.labels_per_class=2"], ["protocol.fraction=0.1"]):
        assert cli("ssl-eval", *line, "protocol=semi", *QUICK, "protocol.seeds=1", *extra).code == 0
    semi = {f"semi_{labels}_seeds-1_steps-2" for labels in ("5pct", "2-per-class", "10pct")}
    assert {path.stem for path in results_dir.glob("*.json")} == names | semi
    assert {path.parent.name for path in results_dir.glob("*/net.pt")} == semi
    few = "semi_5pct_seeds-1_steps-2"
    assert result(results_dir, few)["measured"] == few

    distill = [*line, "protocol=distill", "protocol.steps=2"]
    ended = cli("ssl-eval", *distill, "protocol.teacher=semi")
    assert ended.code == 2
    assert f"protocol.teacher is 'semi', which matches several: {', '.join(sorted(semi))}" in ended.err
    assert cli("ssl-eval", *distill, "protocol.teacher=semi_5pct").code == 0
    taught = result(results_dir, f"distill_{few}_steps-2")["teacher"]
    assert (taught["measured"], taught["net"]) == (few, f"{few}/net.pt")
    for name in semi - {few}:
        (results_dir / f"{name}.json").unlink()
    student = "protocol.student={_target_: sslcli.backbones.small.Small, image_size: 32, width: 4}"
    ended = cli("ssl-eval", *distill, "protocol.teacher=semi", student)
    assert (ended.code, ended.err) == (0, "")
    assert result(results_dir, f"distill_{few}_student-Small-??????_steps-2")["student"] == "Small"


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
        assert "cannot be read and are skipped: " in ended.out
    found = result(trained / "eval", "knn_images-??????_val-0.5_val-in-train")
    assert found["n_train"] + found["n_test"] == 57


def test_other_images_of_the_same_name_do_not_replace_a_result(trained: Path, cli: Cli) -> None:
    cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false")
    own = result(trained / "eval", "knn")
    ended = cli("ssl-eval", f"run={trained}", "protocol=knn", "baselines=false", *OTHER)
    assert (ended.code, ended.err) == (0, "")
    assert result(trained / "eval", "knn") == own
    results = [json.loads(path.read_text()) for path in (trained / "eval").glob("*.json")]
    assert len({found["dataset_fingerprint"] for found in results}) == len(results) == 2


QUICK = ["protocol.steps=2", "protocol.batch_size=16", "protocol.lrs=[0.02,0.1]"]


def fails_at(rank: int, error: Exception) -> tuple[str, int]:
    """Access an item on rank 0 whose features cannot be computed on one process. Return the error on each process."""

    def fail() -> None:
        if collectives.rank() == rank:
            raise error

    class Failing(Starts):
        def start(self, name: str) -> NoReturn:
            shared_work.agreed(fail)
            raise AssertionError

    evaluation: Any = None
    starts = Failing(evaluation, ["trained"], evaluation, keep=False)
    try:
        starts.call_on_main(lambda: starts["trained"])
    except (ConfigError, RuntimeError, OSError, MemoryError) as found:
        return str(found), len(collectives.gather_objects(0))
    raise AssertionError


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), RuntimeError("bad"), OSError("bad")])
def test_an_error_of_one_process_ends_the_others_without_waiting(pair: Pair, rank: int, error: Exception) -> None:
    """Errors of user code and of a full GPU have any type. No process may wait for another one afterwards."""
    for message, size in pair.run(fails_at, rank, error):
        assert str(error) in message
        assert size == 2
