from __future__ import annotations

import json
from pathlib import Path

from exported import exported_run
from sslcli.report.console import Screen
from sslcli.runs.model_card import accuracies, model_card, sentence, versions
from sslcli.weights.export.preprocessing import Preprocessing


def test_the_card_has_the_results_of_its_checkpoint_only(trained: Path) -> None:
    run, screen = exported_run(trained), Screen(silent=True)
    result = {"protocol": "knn", "split": "val", "top1": 0.25, "interval": [0.125, 0.5]}
    (trained / "eval").mkdir()
    for name, digest in (("knn", run.loaded.digest), ("linear", "0" * 64)):
        (trained / "eval" / f"{name}.json").write_text(json.dumps(result | {"checkpoint_sha256": digest}))
    table = accuracies(run, screen)
    assert "| knn | val | 25.0 % | 12.5 % to 50.0 % |" in table
    assert "linear" not in table
    assert "| k-NN during training | val |" in table
    text = model_card(
        run.facts,
        run.saved["about"],
        sources={},
        preprocessing="p",
        usage="u\n",
        table=table,
        check="c",
        library="timm",
    )
    assert text.startswith("---\nlibrary_name: timm\n")
    for part in ("SimCLR", "arxiv.org/abs/2002.05709", "200 training images of shapes", run.loaded.digest, "```\n"):
        assert part in text
    assert not model_card(run.facts, {}, sources={}, preprocessing="p", usage="u\n", table="", check="c").startswith(
        "---"
    )


def test_the_card_names_the_other_weights_of_the_run(trained: Path) -> None:
    run = exported_run(trained)
    sources = {
        "initial weights": {"weights": "timm:resnet18", "checkpoint_sha256": "ab12"},
        "teacher": {"run": "/runs/large", "checkpoint_sha256": "cd34"},
    }
    plain, full = (
        model_card(run.facts, {}, sources=given, preprocessing="p", usage="u\n", table="t", check="c")
        for given in ({}, sources)
    )
    assert "- Initial weights: timm:resnet18, SHA-256 ab12\n- Teacher: /runs/large, SHA-256 cd34\n\n## Use" in full
    assert "licenses of the other weights" in full
    assert "licenses of the other weights" not in plain


def test_a_run_without_results_says_so(trained: Path) -> None:
    (trained / "metrics.jsonl").unlink()
    assert "was not evaluated" in accuracies(exported_run(trained), Screen(silent=True))


def test_the_preprocessing_is_a_sentence() -> None:
    given = Preprocessing(image_size=32, resized_side=37, mean=(0.5,), std=(0.25,))
    assert "to 37 pixels" in sentence(given, is_normalized_by_model=False)
    assert "subtract [0.5] and divide by [0.25]" in sentence(given, is_normalized_by_model=False)
    assert "the model does it" in sentence(given, is_normalized_by_model=True)
    plain = Preprocessing(image_size=32, resized_side=32, mean=(0.0,), std=(1.0,), color_space="lab")
    assert "convert to lab, do not normalize" in sentence(plain, is_normalized_by_model=True)


def test_versions_name_installed_packages() -> None:
    assert versions().startswith("sslcli ")
    assert "nonesuch (not installed)" in versions(("nonesuch",))
