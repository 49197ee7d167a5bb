"""Checkpoint writer of a run. All processes call it; if parameters are not sharded, only rank 0 writes files."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sslcli.distributed import collectives
from sslcli.engine import checkpoint
from sslcli.engine.migrations import SCHEMA
from sslcli.errors import TrainingFailed
from sslcli.system.atomic import temporary_name

if TYPE_CHECKING:  # the import takes seconds and is only needed for sharded runs
    from sslcli.engine.sharded_checkpoint import Snapshot


class Writer:
    """Checkpoint writer of a run. Every process must create a `Writer`, and all processes must make the same calls.

    Args:
        run_dir: the run directory.
        sharded: True if parameters are sharded over the processes. Each process then writes its own shards in the
            background.
    """

    def __init__(self, run_dir: Path, *, sharded: bool) -> None:
        self.run_dir = run_dir
        # While the folder is open, its inode number is not used again, not even after the folder is deleted.
        self.folder: int | None = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
        self.group = (
            dist.new_group(backend="gloo") if sharded else None
        )  # the default group may be in use by the training loop
        self.thread: Thread | None = None
        self.failure: BaseException | None = None

    def save(self, state: dict[str, Any], *, keep: int) -> None:
        """Write `state` as a checkpoint. Then delete all checkpoints except the newest `keep`.

        If no parameters are sharded, this method returns after the write. If parameters are sharded, this method waits
        for the previous write, starts this write in the background, and returns.

        Raises TrainingFailed on all processes if the run directory was deleted, or on a disk error. An error of a write
        in the background is raised by the next call of `save`, `wait` or `close`.
        """
        if self.group is not None:
            from sslcli.engine.sharded_checkpoint import Snapshot

            self.wait()
            path = checkpoint.path_of(self.run_dir, state["step"]).with_suffix("")
            arguments = (path, Snapshot({"schema": SCHEMA, **state}), keep, self.group)
            self.thread = Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self.thread.start()
            return
        failure: list[str | None] = [None]
        if collectives.is_main():
            try:
                if self.is_deleted():
                    raise checkpoint.deleted(self.run_dir)
                checkpoint.save(self.run_dir, state, keep=keep)
            except TrainingFailed as error:
                failure = [str(error)]
        collectives.broadcast_objects(failure)
        if failure[0]:
            raise TrainingFailed(failure[0])

    def is_deleted(self) -> bool:
        """Return True if the run directory was deleted, renamed or replaced since this writer was created.

        Another run may use the path of the directory now, so this run must not write to it.
        """
        assert self.folder is not None
        try:
            return not os.path.samestat(os.fstat(self.folder), os.stat(self.run_dir))
        except (FileNotFoundError, NotADirectoryError):
            return True

    def wait(self) -> None:
        """Wait until the write in the background is on disk.

        If the write failed, its error is raised: TrainingFailed for a disk error.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Wait until the write in the background is on disk (see `wait`), and close the handle of the run directory."""
        try:
            self.wait()
        finally:
            folder, self.folder = self.folder, None
            if folder is not None:
                os.close(folder)

    def _write(self, path: Path, snapshot: Snapshot, keep: int, group: dist.ProcessGroup) -> None:
        from sslcli.engine import sharded_checkpoint

        def finish() -> None:
            checkpoint.publish(temporary, path)
            checkpoint.prune(path, keep=keep)

        def begin() -> None:
            if self.is_deleted():
                raise OSError(str(checkpoint.deleted(self.run_dir)))
            checkpoint.make_room(path.parent)

        try:
            sharded_checkpoint.on_main(begin, group)
            temporary = sharded_checkpoint.together(lambda: temporary_name(path), group)[
                0
            ]  # all processes use the temporary name that the main process chose
            sharded_checkpoint.write(temporary, snapshot, group=group)
            sharded_checkpoint.on_main(finish, group)
        except OSError as error:
            with suppress(OSError):
                sharded_checkpoint.on_main(begin, group)
            self.failure = (
                checkpoint.deleted(self.run_dir) if self.is_deleted() else checkpoint.write_failure(path, error)
            )
        except BaseException as error:  # `wait` raises this error in the training loop
            self.failure = error
