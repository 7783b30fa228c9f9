"""Monitoring of runs: metric log, progress, live view, and doctor."""

from reinforcepp.monitoring.metric_log import (
    EVENTS,
    LOGS,
    Clock,
    MetricLog,
    log_event,
    read_metrics,
    restore_logs,
    rounded,
)
from reinforcepp.monitoring.progress import PROGRESS_ROWS, Progress, reading_progress

__all__ = [
    "EVENTS",
    "LOGS",
    "PROGRESS_ROWS",
    "Clock",
    "MetricLog",
    "Progress",
    "log_event",
    "read_metrics",
    "reading_progress",
    "restore_logs",
    "rounded",
]
