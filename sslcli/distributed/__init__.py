"""Collectives, device selection, process launch and the watchdog for stalled ranks."""
