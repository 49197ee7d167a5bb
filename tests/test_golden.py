"""Every golden case is used by a test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from golden_cases import FOLDER, golden_cases

ENTRIES = json.loads((FOLDER / "index.json").read_text())
PREFIXES = {
    prefix
    for path in Path(__file__).parent.rglob("test_*.py")
    for prefix in re.findall(r'^@golden_cases\("(\w+)"', path.read_text(), flags=re.MULTILINE)
}
# Methods that sslcli does not have, or not completely.
OF_OTHER_METHODS = {
    "capi",
    "dinov3",
    "msn",
    "vicregl",
}


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["case"] for entry in ENTRIES])
def test_every_case_of_a_method_is_asked_for_and_has_a_file(entry: dict[str, str]) -> None:
    assert (FOLDER / f"{entry['case']}.safetensors").is_file()
    if entry["method"] not in OF_OTHER_METHODS:
        assert [prefix for prefix in PREFIXES if entry["case"].startswith(prefix)]


def test_a_test_that_finds_no_case_is_an_error() -> None:
    with pytest.raises(LookupError, match="no golden case begins with 'nothing'"):
        golden_cases("nothing")
