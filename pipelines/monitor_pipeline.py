"""The pipeline that checks a running service; a cron job or a person starts it."""

from zenml import pipeline
from zenml.enums import ExecutionMode

from steps.config import MonitorConfig
from steps.monitor import alert as alert_step
from steps.monitor import detect_drift


@pipeline(execution_mode=ExecutionMode.FAIL_FAST)
def monitor_pipeline(monitor: MonitorConfig = MonitorConfig()) -> None:
    """Compare the service's request log with the served run: drift report, and alert on drift."""
    drift, _ = detect_drift(monitor)
    alert_step(drift, monitor)
