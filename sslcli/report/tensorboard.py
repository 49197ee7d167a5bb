"""TensorBoard writer for folders with any name. TensorBoard itself rejects names that are not valid UTF-8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the import takes a second
    from torch.utils.tensorboard import SummaryWriter


def open_writer(folder: Path, *, purge_step: int) -> SummaryWriter:
    """Create `folder` if it does not exist, and return a writer of TensorBoard event files in it.

    The folder may contain files of earlier writers. TensorBoard hides their entries from step `purge_step` on, because
    a resumed run writes these steps again. If `purge_step` is 0, TensorBoard hides all entries of earlier writers.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(utf8_path(folder), purge_step=purge_step)


def utf8_path(folder: Path) -> str:
    """Return a path of `folder` that is valid UTF-8, because TensorBoard rejects all other paths.

    If the path of the folder is not valid UTF-8, the folder is created if it is missing, and it is opened. The result
    is then the path of the open folder in /proc (Linux). TensorBoard's writer opens its file several times. Therefore
    the folder stays open until the process exits.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        folder.mkdir(parents=True, exist_ok=True)
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"
    return str(folder)
