from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sslcli.report.metrics import Metrics, encode, newest, read


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read(path)]


def test_a_line_is_one_json_object_with_names_and_values_as_they_were_given() -> None:
    line = {"step": 3, "train/loss": 0.1 + 0.2, "monitor/knn_top1": 1e-300}
    text = encode(line)
    assert text.endswith("}\n")
    assert text.count("\n") == 1
    assert json.loads(text) == line
    assert list(json.loads(text)) == list(line)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_in_valid_json(value: float) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(encode({"step": 1, "loss": value}), parse_constant=refuse) == {"step": 1, "loss": None}


def test_a_written_line_is_in_the_file_at_once(path: Path) -> None:
    metrics = Metrics(path, step=0, warn=pytest.fail)
    for step in (1, 2):
        metrics.write({"step": step})
        assert path.read_text().count("\n") == step
    metrics.close()


def test_a_run_that_goes_on_drops_the_lines_after_its_checkpoint_and_repeats_them(path: Path) -> None:
    first = Metrics(path, step=0, warn=pytest.fail)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = Metrics(path, step=3, warn=pytest.fail)
    assert steps(path) == [1, 2, 3]
    for step in (4, 5, 6):
        second.write({"step": step, "loss": 2.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in read(path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_a_new_run_in_the_place_of_one_without_checkpoint_begins_anew(path: Path) -> None:
    path.write_text(encode({"step": 0}) + encode({"step": 1}) + encode({"step": 2}))
    Metrics(path, step=0, warn=pytest.fail).close()
    assert path.read_text() == ""


def test_a_torn_last_line_is_dropped_and_the_next_begins_a_line_of_its_own(path: Path) -> None:
    whole = encode({"step": 1, "loss": 0.5})
    path.write_text(whole + '{"step": 2, "lo')
    assert read(path) == [{"step": 1, "loss": 0.5}]
    metrics = Metrics(path, step=7, warn=pytest.fail)
    metrics.write({"step": 8})
    metrics.close()
    assert path.read_text() == whole + encode({"step": 8})


GOOD = [encode({"step": step, "train/loss": step / 2}).encode() for step in range(1, 7)]


@pytest.mark.parametrize(
    ("content", "survivors", "damaged"),
    [
        (GOOD[0] + b"\0" * 40 + b"\n" + GOOD[2], [1, 3], 1),
        (GOOD[0] + b"\0" * 40 + GOOD[1] + GOOD[2], [1, 2, 3], 0),
        (GOOD[0] + b'{"step": 2, "a\xff": 1}\n\xff\n' + GOOD[2], [1, 3], 2),
        (b"".join(GOOD[:3]) * 2, [1, 2, 3], 3),
        (GOOD[0] + GOOD[2] + GOOD[1], [1, 2, 3], 0),
        (GOOD[0] + b'[1]\n"x"\n3\nnull\n{}\n\n' + GOOD[1], [1, 2], 6),
        (GOOD[0] + b'{"step": "2"}\n{"step": 2.0}\n{"step": true}\n{"step": -1}\n' + GOOD[2], [1, 3], 4),
        (GOOD[0] + b'{"step": 2, "train/loss": "low"}\n{"step": 2, "x": [1]}\n' + GOOD[2], [1, 3], 2),
        (GOOD[0] + GOOD[1][:9] + b"\n" + GOOD[2] + GOOD[3][:9], [1, 3], 1),
        (GOOD[0] + b"[" * 100_000 + b"\n" + GOOD[1][:-1], [1, 2], 1),
    ],
    ids=["nul", "nul before", "no UTF-8", "doubled", "order", "no object", "no step", "values", "cut", "deep"],
)
def test_damaged_lines_are_counted_and_the_others_survive(
    content: bytes, survivors: list[int], damaged: int, path: Path
) -> None:
    path.write_bytes(content)
    assert steps(path) == survivors
    assert newest(path, "train/loss") == survivors[-1] / 2
    warnings: list[str] = []
    metrics = Metrics(path, step=9, warn=warnings.append)
    metrics.write({"step": 10})
    metrics.close()
    assert steps(path) == [*survivors, 10]
    aside = path.with_name("metrics.jsonl.damaged")
    if damaged:
        assert len(warnings) == 1
        assert f"is now named metrics.jsonl.damaged: {damaged} lines are dropped" in warnings[0]
        assert aside.read_bytes() == content
    assert (warnings != []) == aside.exists() == (damaged > 0)
    Metrics(path, step=10, warn=pytest.fail).close()


def test_the_last_of_several_lines_of_a_step_counts(path: Path) -> None:
    path.write_text(encode({"step": 1, "a": 1.0}) + encode({"step": 1, "a": 2.0}))
    assert newest(path, "a") == 2.0


def test_lines_kept_are_the_same_bytes(path: Path) -> None:
    text = encode({"step": 1, "loss": 0.1, "name": None}) + encode({"step": 2, "loss": 1 / 3})
    path.write_text(text)
    Metrics(path, step=2, warn=pytest.fail).close()
    assert path.read_text() == text


def test_reading_what_is_not_there_gives_no_lines(path: Path) -> None:
    assert read(path) == []
    assert newest(path, "loss") is None


def test_the_newest_value_is_the_last_that_is_there(path: Path) -> None:
    path.write_text("".join(map(encode, [{"step": 1, "a": 1.0}, {"step": 2, "a": 0.0}, {"step": 3, "a": math.nan}])))
    assert newest(path, "a") == 0.0
    assert newest(path, "b") is None
