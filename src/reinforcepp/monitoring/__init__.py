"""What a run tells: the metric log, the progress line, the training curve."""

from reinforcepp.monitoring.metric_log import EVENTS, LOGS, Clock, MetricLog, note_event, read_metrics, restore_logs
from reinforcepp.monitoring.progress import Progress, console, echo, printable, reading_progress

__all__ = [
    "EVENTS",
    "LOGS",
    "Clock",
    "MetricLog",
    "Progress",
    "console",
    "echo",
    "note_event",
    "printable",
    "read_metrics",
    "reading_progress",
    "restore_logs",
]
