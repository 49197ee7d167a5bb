"""American spelling and plain verbs in all tracked text files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNCHECKED = ("CHANGELOG.md", "tests/golden/", "tests/old/", "tests/test_spelling.py")
BRITISH = re.compile(
    r"""
      (colou|favou|honou|labou|behaviou|neighbou|flavou|harbou|rumou|humou)r
    | grey | centre | metre\b | fibre | theatre | artefact | whilst | amongst | towards\b | learnt\b | spelt\b
    | ( normal | optim | initial | serial | general | visual | summar | organ | recogn | standard | parallel | random
      | regular | quant | special | util | minim | maxim | custom | categor | emphas | synchron | token | equal | penal
      | stabil | discret | factor | vector | binar | local | memor | real | priorit | author | apolog | character
      | symmetr | capital | central | material | modern | neutral | final | formal | sparsif | critic | mobil | ideal
      ) is ( e[ds]?\b | ing | ation | er )
    | analys( ed? | er | ing )\b
    | ( label | model | travel | cancel | signal | level | channel | total | fuel | tunnel ) l ( ed | ing | er )\b
    | catalogue | licence | defence | offence | judgement | sceptic | fulfil\b | programme\b | practise
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Verbs with a plainer term: print, log, return, report, state, show, inform.
BANNED = re.compile(r"\b(told|tells|telling)\b", re.IGNORECASE)
PROSE = ("sslcli/", "docs/", "README.md", "conf/")  # what users read, and the code
ALLOWED = {  # word -> the files that need it
    "unlabelled": (  # an old key
        "docs/configuration.md",
        "sslcli/config/moved.py",
        "tests/config/test_moved.py",
        "tests/test_old_runs.py",
    ),
    "labelled": ("sslcli/data/sources/base.py", "tests/data/sources/test_base.py"),  # an old class attribute
    "colour": ("tests/data/sources/test_base.py",),  # a mistake that is refused
    "cancelled": ("sslcli/runs/slurm/queue.py", "tests/runs/slurm/"),  # a state of Slurm
    "told": ("sslcli/data/shards/index.py", "sslcli/data/sources/records.py"),  # the name of an array in cached files
}


def text_files() -> dict[str, str]:
    """The content of every tracked text file that is checked, by its path."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is not a git checkout")
    found = {}
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if not name or name.startswith(UNCHECKED) or path.suffix == ".svg" or not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        if b"\0" not in content:
            found[name] = content.decode("utf-8")
    return found


def is_allowed(word: str, name: str) -> bool:
    return any(name.startswith(ALLOWED[known]) for known in ALLOWED if known in word.lower())


def findings(pattern: re.Pattern[str], name: str, text: str) -> list[str]:
    """`file:line: word` for every word of a text in which the pattern occurs."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for match in pattern.finditer(line):
            start = re.search(r"\w*$", line[: match.start()])
            assert start is not None
            word = start[0] + match[0] + re.match(r"\w*", line[match.end() :])[0]  # type: ignore[index]
            if not is_allowed(word, name):
                found.append(f"{name}:{number}: {word}")
    return found


def test_spelling_is_american() -> None:
    files = text_files()
    assert len(files) > 300
    assert [line for name, text in files.items() for line in findings(BRITISH, name, text)] == []


def test_prose_has_plain_verbs() -> None:
    files = {name: text for name, text in text_files().items() if name.startswith(PROSE)}
    assert len(files) > 200
    assert [line for name, text in files.items() for line in findings(BANNED, name, text)] == []


@pytest.mark.parametrize(
    "word",
    [
        *("colour", "Greyscale", "normalised", "optimiser", "initialise", "behaviours", "centred", "neighbours"),
        *("labelled", "unmodelled", "analyse", "licence", "towards", "cancelled", "serialisation", "_colour_space"),
    ],
)
def test_british_words_are_found(word: str) -> None:
    (line,) = findings(BRITISH, "docs/x.md", f"the first line\nhas the word {word} in it")
    assert line == f"docs/x.md:2: {word}"


@pytest.mark.parametrize("word", ["told", "tells", "Telling"])
def test_banned_words_are_found(word: str) -> None:
    assert findings(BANNED, "docs/x.md", f"it {word} more") == [f"docs/x.md:1: {word}"]


@pytest.mark.parametrize(
    "text",
    [
        "color gray normalized optimizer behavior center neighbor labeled canceled analysis analyses",
        "toward otherwise exercise noise raise advise precise promise comparison enterprise parameter",
        "file.tell() retell",
    ],
)
def test_american_words_are_accepted(text: str) -> None:
    assert findings(BRITISH, "docs/x.md", text) + findings(BANNED, "docs/x.md", text) == []


def test_a_word_is_allowed_only_in_its_files() -> None:
    assert findings(BRITISH, "docs/configuration.md", "dataset.unlabelled") == []
    assert findings(BRITISH, "docs/data.md", "dataset.unlabelled") == ["docs/data.md:1: unlabelled"]
