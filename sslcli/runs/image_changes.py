"""Whether the images of a run are those it began with: noted in `images.npz`, compared when it goes on.

Only the main process looks; all others get its answer, so that none trains while another one refuses.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sslcli.data.sources.base import Source
from sslcli.data.sources.records import UNKNOWN, Changes, Records, changed_images_error, compare, pack, unpack
from sslcli.distributed import collectives, watchdog
from sslcli.errors import ConfigError
from sslcli.report.console import Screen
from sslcli.runs import directory
from sslcli.system import atomic

FILE = "images.npz"


def check_images(run_dir: Path, source: Source, screen: Screen, *, write: bool) -> None:
    """Compare the images with those the run began with, and note them. All processes of the run call it together.

    Raises ConfigError on all of them where the images changed since, as far as `dataset.verify` says.

    Args:
        run_dir: of the run. A run without a checkpoint begins now, and one of an older version notes the images now.
        source: the images there are.
        screen: gets the progress where files are read.
        write: whether the images may be noted, which a dry run must not do.
    """
    if source.verify == "none":
        return
    found: list[ConfigError | Records | None] = [None]
    if collectives.is_main():
        try:
            found[0] = _accepted(run_dir, source, screen)
        except ConfigError as error:
            found[0] = error
    answer = [str(found[0]) if isinstance(found[0], ConfigError) else ""]
    collectives.broadcast_objects(answer)
    if answer[0]:
        raise ConfigError(answer[0])
    if write and isinstance(found[0], Records):
        atomic.replace(run_dir / FILE, pack(found[0]))


def _accepted(run_dir: Path, source: Source, screen: Screen) -> Records | None:
    """Return what is to be noted of the images; None where that is noted already. Raises ConfigError as above."""
    now = take(source, screen)
    if not directory.has_checkpoint(run_dir):
        return now
    try:
        then = stored(run_dir)
    except ValueError as error:
        raise ConfigError(
            f"{run_dir / FILE} is damaged ({error}), so it cannot be told whether the images changed since this run "
            "began: put the file back, or delete it to go on with the images as they are"
        ) from error
    if then is None:
        return now
    changes = compare(then, now, times=source.verify != "sizes")
    if changes:
        raise changed_images_error(changes, name=source.name, known=bool((then.contents != UNKNOWN).all()))
    # The times are those of this place from now on, and what is known of the contents stays known.
    merged = now if (now.contents != UNKNOWN).any() else replace(now, contents=then.contents)
    return None if list(merged.columns()) == list(then.columns()) else merged


def changes_since(run_dir: Path, source: Source, screen: Screen) -> Changes | None:
    """Return what differs from the images that the run began with; None where that is not known or not asked for."""
    if source.verify == "none":
        return None
    try:
        then = stored(run_dir)
    except ValueError as error:
        screen.warn(f"{run_dir / FILE} is damaged ({error}): it cannot be told whether the images changed since")
        return None
    return None if then is None else compare(then, take(source, screen), times=source.verify != "sizes")


def warn_of_changes(run_dir: Path, source: Source, screen: Screen) -> None:
    """Warn in one line where the images of a run are not those it was trained on."""
    changes = changes_since(run_dir, source, screen)
    if changes and changes.only_times_differ:
        screen.warn(
            f"the images may have changed since the run was trained on them: {changes.describe()}. If they are only "
            "copies, dataset.verify=sizes leaves out the times"
        )
    elif changes:
        screen.warn(f"these are not the images that the run was trained on: {changes.describe()}")


def stored(run_dir: Path) -> Records | None:
    """Return the records of the images a run began with; None where there are none. Raises ValueError if damaged."""
    path = run_dir / FILE
    try:
        return unpack(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def take(source: Source, screen: Screen) -> Records:
    """Return the records of the images, their contents included where `dataset.verify` says so."""
    title = "reading the images to compare them" if source.verify == "contents" else "looking at the image files"
    begun = False

    def on_progress(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            screen.start(title, total=total)
            begun = True
        watchdog.report_progress(title)  # the other processes wait meanwhile
        screen.advance(done)

    try:
        return source.records(contents=source.verify == "contents", on_progress=on_progress)
    finally:
        if begun:
            screen.stop()
