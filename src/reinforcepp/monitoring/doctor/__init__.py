"""Common problems of RL runs, found in the metrics of a finished or a running one."""

from reinforcepp.monitoring.doctor.diagnosis import Diagnosis, diagnose
from reinforcepp.monitoring.doctor.finding import SEVERITIES, Finding

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "diagnose"]
