"""Metrics of predictions against targets, and their exact means over batches."""

from kaun.metrics.functions import Counted as Counted
from kaun.metrics.functions import accuracy as accuracy
from kaun.metrics.functions import binary_accuracy as binary_accuracy
from kaun.metrics.functions import f1 as f1
from kaun.metrics.functions import precision as precision
from kaun.metrics.functions import recall as recall
from kaun.metrics.sums import Counts as Counts
from kaun.metrics.sums import Mean as Mean
from kaun.metrics.sums import MetricSums as MetricSums
from kaun.metrics.sums import Part as Part
from kaun.metrics.sums import Ratio as Ratio
from kaun.metrics.sums import run_ahead as run_ahead
from kaun.metrics.tracker import Tracker as Tracker
from kaun.metrics.tracker import evaluate as evaluate
from kaun.metrics.tracker import evaluate_many as evaluate_many

# What users reach; the rest is for kaun.evaluation.
__all__ = [
    "Counted", "Tracker", "accuracy", "binary_accuracy", "evaluate", "evaluate_many", "f1", "precision", "recall",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
