"""One record per optimizer step, and the places it goes: metrics.jsonl, TensorBoard, the progress line, the audit."""

from megamoe.metrics.audit import AuditWriter, truncate_audit
from megamoe.metrics.metrics_file import MetricsWriter, read_metrics
from megamoe.metrics.progress_bar import Progress
from megamoe.metrics.tensorboard import TensorBoardSink

__all__ = ["AuditWriter", "MetricsWriter", "Progress", "TensorBoardSink", "read_metrics", "truncate_audit"]
