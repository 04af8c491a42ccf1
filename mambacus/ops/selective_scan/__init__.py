"""Selective scan: the recurrence of the state-space model."""

from mambacus.ops.selective_scan.interface import selective_scan, selective_state_update

__all__ = ["selective_scan", "selective_state_update"]
