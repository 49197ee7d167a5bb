"""Detection of changed images. `images.npz` in the run directory contains records of the images.

The current images are compared with these records when the run resumes and when it is evaluated. Only rank 0 compares
them. Rank 0 then broadcasts whether they are equal, so that either all processes continue or all processes raise an
error.
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
from sslcli.system.stored import DamagedFile, read_bytes

FILE = "images.npz"
MAX_BYTES = 16_000_000_000  # size of the file; the records of a million images have about 30 MB
REMEDY = (
    "it cannot be checked whether the images changed since this run started; restore a copy, or delete the file to use "
    "the images as they are"
)


def check_images(run_dir: Path, source: Source, screen: Screen, *, write: bool) -> None:
    """Compare the current images with the stored records of the run's images, and write new records.

    A record contains the name, label, size and modification time of an image. If dataset.verify was `contents` at a
    start of the run, it also contains a hash of the image file. `dataset.verify` selects what is compared. If the
    images changed, ConfigError is raised on all processes. This is a collective operation: all processes must call it.

    Args:
        run_dir: the run directory. If it has no checkpoint or no records, no images are compared.
        source: the current images.
        screen: the progress display.
        write: False in a dry run, which must not write records.
    """
    if source.verify == "none":
        return
    found: list[ConfigError | Records | None] = [None]
    if collectives.is_main():
        try:
            found[0] = _records_to_write(run_dir, source, screen)
        except ConfigError as error:
            found[0] = error
    answer = [str(found[0]) if isinstance(found[0], ConfigError) else ""]
    collectives.broadcast_objects(answer)
    if answer[0]:
        raise ConfigError(answer[0])
    if write and isinstance(found[0], Records):
        atomic.replace(run_dir / FILE, pack(found[0]))


def _records_to_write(run_dir: Path, source: Source, screen: Screen) -> Records | None:
    """Compare the current images with the stored records. Return new records, or None if the stored ones are equal.

    If the run has no checkpoint or no stored records, nothing is compared, and new records are returned. Raises
    ConfigError if the images changed or the stored records are damaged.
    """
    now = collect_records(source, screen)
    if not directory.has_checkpoint(run_dir):
        return now
    before = stored_records(run_dir)
    if before is None:
        return now
    changes = compare(before, now, times=source.verify != "sizes")
    if changes:
        raise changed_images_error(changes, name=source.name, known=bool((before.contents != UNKNOWN).all()))
    # Store the current modification times. If this start computed no digests, keep the digests of the old records.
    merged = now if (now.contents != UNKNOWN).any() else replace(now, contents=before.contents)
    return None if list(merged.columns()) == list(before.columns()) else merged


def changes_since(run_dir: Path, source: Source, screen: Screen) -> Changes | None:
    """Return the changes of the images since the run started.

    Return None if the run has no usable records of its images, or if dataset.verify is `none`.
    """
    if source.verify == "none":
        return None
    try:
        before = stored_records(run_dir)
    except ConfigError as error:
        screen.warn(str(error))
        return None
    return None if before is None else compare(before, collect_records(source, screen), times=source.verify != "sizes")


def warn_of_changes(run_dir: Path, source: Source, screen: Screen) -> None:
    """Print a one-line warning if the images have changed since the run was trained."""
    changes = changes_since(run_dir, source, screen)
    if changes and changes.only_times_differ:
        screen.warn(
            f"the images may have changed since the run was trained on them: {changes.describe()}. If they are only "
            "copies, dataset.verify=sizes ignores the times"
        )
    elif changes:
        screen.warn(f"these are not the images that the run was trained on: {changes.describe()}")


def stored_records(run_dir: Path) -> Records | None:
    """Return the records of the images in the file `images.npz` of the run, or None if there is no such file.

    Raises DamagedFile if the records are damaged, and ConfigError if the file cannot be read.
    """
    path = run_dir / FILE
    try:
        return unpack(read_bytes(path, remedy=REMEDY, most=MAX_BYTES))
    except FileNotFoundError:
        return None
    except ConfigError:
        raise
    except ValueError as error:
        raise DamagedFile(path, str(error), REMEDY) from error


def collect_records(source: Source, screen: Screen) -> Records:
    """Return the records of the current images.

    If dataset.verify is `contents`, the records include hashes of the image files.
    """
    title = "reading the images to compare them" if source.verify == "contents" else "checking the image files"
    started = False

    def on_progress(done: int, total: int) -> None:
        nonlocal started
        if not started:
            screen.start(title, total=total)
            started = True
        watchdog.report_progress(title)  # the other processes wait for this process
        screen.advance(done)

    try:
        return source.records(contents=source.verify == "contents", on_progress=on_progress)
    finally:
        if started:
            screen.stop()
