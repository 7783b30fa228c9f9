"""What a run tells: the metric log, the progress line, the training curve."""

from reinforcepp.observe.metrics import Clock, MetricLog, read_metrics, step_metrics
from reinforcepp.observe.progress import Progress, console, printable, say

__all__ = ["Clock", "MetricLog", "Progress", "console", "printable", "read_metrics", "say", "step_metrics"]
