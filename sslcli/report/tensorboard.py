"""TensorBoard writer for folders with any name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the import takes a second
    from torch.utils.tensorboard import SummaryWriter


def open_writer(folder: Path, *, purge_step: int) -> SummaryWriter:
    """Create `folder` if it does not exist, and return a writer of event files in it.

    TensorBoard hides the entries of earlier writers from step `purge_step` on. With 0, it hides nothing.
    """
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(utf8_path(folder), purge_step=purge_step)


def utf8_path(folder: Path) -> str:
    """Return a path of `folder` that is valid UTF-8, because TensorBoard rejects all other paths.

    If the name of the folder is not UTF-8, the folder is created and opened. The result is then the path of the open
    folder in /proc (Linux). The folder stays open until the process exits, because the writer opens its file several
    times.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        folder.mkdir(parents=True, exist_ok=True)
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY | os.O_DIRECTORY)}"
    return str(folder)
