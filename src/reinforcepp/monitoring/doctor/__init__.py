"""What went wrong in a training, or goes wrong in one that runs, in plain words."""

from reinforcepp.monitoring.doctor.diagnosis import Diagnosis, diagnose
from reinforcepp.monitoring.doctor.finding import SEVERITIES, Finding

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "diagnose"]
