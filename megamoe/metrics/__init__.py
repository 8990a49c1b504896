"""Counters, the record of a step, and where it goes: metrics.jsonl, TensorBoard, progress line; the audit of samples."""

from megamoe.metrics.audit import AuditWriter, truncate_audit
from megamoe.metrics.metrics_file import MetricsWriter, read_metrics
from megamoe.metrics.progress_bar import Progress
from megamoe.metrics.step_record import StepRecord
from megamoe.metrics.tensorboard import TensorBoardSink

__all__ = ["AuditWriter", "MetricsWriter", "Progress", "StepRecord", "TensorBoardSink", "read_metrics", "truncate_audit"]
