from __future__ import annotations

from sslcli.engine.slow_data import SlowData, faster_data


def test_a_minute_of_mostly_waiting_is_reported_once() -> None:
    detector = SlowData()
    assert detector.update(100.0, 100.0) is None, "the workers start in the first interval"
    assert detector.update(30.0, 20.0) is None, "half a minute is too short"
    assert detector.update(30.0, 25.0) == 0.75
    assert detector.update(120.0, 120.0) is None, "one warning is enough"


def test_a_short_wait_in_a_long_time_is_not_reported() -> None:
    detector = SlowData()
    detector.update(1.0, 1.0)
    assert detector.update(100.0, 20.0) is None
    assert detector.update(59.0, 59.0) is None
    assert detector.update(100.0, 60.0) is not None, "the 159 seconds before are not forgotten"


def test_the_remedy_names_only_what_can_still_be_done() -> None:
    assert "dataset.workers=7 (now 2, with 8 cores" in faster_data(workers=2, cores=8, in_memory=False, can_cache=False)
    assert "keep_decoded" not in faster_data(workers=2, cores=8, in_memory=False, can_cache=False)
    full = faster_data(workers=7, cores=8, in_memory=False, can_cache=True)
    assert "dataset.workers" not in full
    assert "dataset.keep_decoded=ram" in full
    assert "dataset." not in faster_data(workers=0, cores=8, in_memory=True, can_cache=True)
