"""Device on which the GPU tests run."""

from __future__ import annotations

import pytest


def chosen(config: pytest.Config) -> str | None:
    """Return the device of the GPU tests: "cuda", "cpu", or None if none was chosen, as in `make test`.

    `--device` or the environment variable SSLCLI_TEST_DEVICE selects a device. With `-m gpu`, the default is "cuda".
    """
    device = config.getoption("--device") or ("cuda" if config.getoption("-m") == "gpu" else None)
    assert device is None or isinstance(device, str)
    return device
