"""Messages about missing and unknown keys. A message about an unknown key suggests the closest known key."""

from __future__ import annotations

from collections.abc import Iterable

from sslcli.errors import nearest


def missing_message(where: str, names: list[str]) -> str:
    """Return the error message for missing keys."""
    path = f"{where}.{names[0]}" if where else names[0]
    return f"{where or 'the configuration'} lacks {', '.join(names)}: set it with {path}=..."


def unknown_message(where: str, key: str, known: Iterable[str]) -> str:
    """Return the error message for a key that does not exist."""
    names = sorted(str(name) for name in known)
    path = f"{where}.{key}" if where else key
    return (
        f"{path}: there is no such key.{nearest(key, names)} "
        f"Known keys{f' in {where}' if where else ''}: {', '.join(names) or 'none'}"
    )
