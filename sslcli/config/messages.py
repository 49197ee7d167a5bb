"""Error messages about missing and unknown configuration keys.

For an unknown key, the closest known key is suggested.
"""

from __future__ import annotations

from collections.abc import Iterable

from sslcli.errors import nearest


def missing_message(where: str, names: list[str]) -> str:
    """Return the error message for the missing keys `names`.

    `where` is the dotted key of the mapping that lacks the keys, or "" for the whole configuration.
    """
    path = f"{where}.{names[0]}" if where else names[0]
    return f"{where or 'the configuration'} lacks {', '.join(names)}: set it with {path}=..."


def unknown_message(where: str, key: str, known: Iterable[str]) -> str:
    """Return the error message for a key that does not exist.

    `where` is the dotted key of the mapping that contains `key`, or "" for the whole configuration. `known` are the
    keys that this mapping may contain.
    """
    names = sorted(str(name) for name in known)
    path = f"{where}.{key}" if where else key
    return (
        f"{path}: there is no such key.{nearest(key, names)} "
        f"Known keys{f' in {where}' if where else ''}: {', '.join(names) or 'none'}"
    )
