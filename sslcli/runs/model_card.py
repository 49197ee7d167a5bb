"""Model card of an export: what the network is, how it was trained, its accuracies, and how to use it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sslcli.report import metrics
from sslcli.report.console import Screen, percent
from sslcli.report.evaluation_tables import results
from sslcli.runs.exported_run import ExportedRun
from sslcli.weights.export.preprocessing import Preprocessing

LICENSE_OF_SOURCES = "The licenses of the other weights that are named above may restrict it.\n"
PACKAGES = ("sslcli", "torch", "torchvision")  # their versions are always part of the card


def versions(packages: tuple[str, ...] = ()) -> str:
    """Return the installed versions of sslcli, torch, torchvision and `packages`, as in `sslcli 0.2.0, torch 2.9`."""
    return ", ".join(f"{name} {_version(name)}" for name in (*PACKAGES, *packages))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def accuracies(run: ExportedRun, screen: Screen) -> str:
    """Return a Markdown table of the results of ssl-eval for the exported checkpoint, and of the online k-NN.

    Results of other checkpoints are omitted.
    """
    origin = run.facts["provenance"]
    rows = []
    for name, result in results(run.run_dir / "eval", screen).items():
        if result.get("checkpoint_sha256") != origin["checkpoint_sha256"]:
            continue
        low, high = result["interval"]
        rows.append(f"| {name} | {result['split']} | {percent(result['top1'])} | {percent(low)} to {percent(high)} |")
    lines = [line for line in metrics.read(run.run_dir / "metrics.jsonl") if line["step"] == origin["step"]]
    online = lines[-1].get("monitor/knn_top1") if lines else None
    if online is not None:
        rows.append(f"| k-NN during training | val | {percent(online)} | not measured |")
    if not rows:
        return f"This checkpoint was not evaluated: `ssl-eval run={run.run_dir}`."
    return "\n".join(["| evaluation | images | top-1 | 95 % interval |", "|---|---|---|---|", *rows])


def sentence(given: Preprocessing, *, is_normalized_by_model: bool) -> str:
    """Return the preprocessing of images as text."""
    size, side = f"{given.image_size} x {given.image_size}", given.resized_side
    steps = [
        f"resize the shorter side of images that are not {size} pixels to {side} pixels (bilinear, antialiased)",
        f"crop the center of {size} pixels",
        "scale to [0, 1]",
        *([f"convert to {given.color_space}"] if given.color_space != "rgb" else []),
        f"subtract {list(given.mean)} and divide by {list(given.std)}"
        if given.is_normalized
        else "do not normalize further",
    ]
    if given.is_normalized and is_normalized_by_model:
        steps[-1] = "do not normalize: the model does it"
    return f"{', '.join(steps)}. The values are in `preprocessing.json`."


def model_card(
    facts: dict[str, Any],
    about: dict[str, Any],
    *,
    sources: dict[str, dict[str, Any]],
    preprocessing: str,
    usage: str,
    table: str,
    check: str,
    packages: tuple[str, ...] = (),
    library: str = "",
) -> str:
    """Return the text of a model card in Markdown.

    Args:
        facts: the entries of an export that describe its origin.
        about: title, year and paper of the method; {} if the run does not state them.
        sources: records of other weights that the run used, such as those of its teacher, see `other_weights`.
        preprocessing, usage, table, check: texts of sections.
        packages: packages besides torch whose versions are stated.
        library: name of the library for the Hugging Face Hub; "" = no header for the Hub.
    """
    origin = facts["provenance"]
    method = str(facts["method"]["_target_"]).rpartition(".")[2]
    title, paper = about.get("title", method), about.get("paper")
    backbone = facts["backbone"]
    named = backbone.get("arch") or backbone.get("name") or str(backbone["_target_"]).rpartition(".")[2]
    header = f"---\nlibrary_name: {library}\ntags:\n- self-supervised\n- image-feature-extraction\n---\n\n"
    return f"""\
{header if library else ""}# {named}, pre-trained with {title} on {origin["pretrained_on"]}

## Model

- Method: {title}{f" ({paper})" if paper else ""}, pre-training without labels
- Backbone: {named} ({", ".join(f"{key}={value}" for key, value in backbone.items() if key != "_target_")})
- Images: {facts["num_images"]:,} training images of {origin["pretrained_on"]}, fingerprint {facts["image_fingerprint"]}
- Checkpoint: step {origin["step"]:,}, SHA-256 {origin["checkpoint_sha256"]}
{other_weights(sources)}
## Use

Preprocessing of `images` (N, {len(facts["mean"])}, {facts["image_size"]}, {facts["image_size"]}): {preprocessing}

```python
{usage}```

## Accuracy

{table}

## Check

{check}

Versions: {versions(packages)}.

## License

Not stated. Add the license of the weights before you publish them.
{LICENSE_OF_SOURCES if sources else ""}"""


def other_weights(sources: dict[str, dict[str, Any]]) -> str:
    """Return one line of a Markdown list for each record of other weights, such as {"teacher": record}.

    A record has the keys of `WeightsSource.provenance`.
    """
    lines = [
        f"- {title.capitalize()}: {record.get('weights') or record.get('run')}, SHA-256 {record['checkpoint_sha256']}\n"
        for title, record in sources.items()
    ]
    return "".join(lines)
