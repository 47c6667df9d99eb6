"""Metrics of predictions against targets, and their exact means over batches."""

from kaun.metrics.functions import Counted as Counted
from kaun.metrics.functions import accuracy as accuracy
from kaun.metrics.functions import binary_accuracy as binary_accuracy
from kaun.metrics.functions import f1 as f1
from kaun.metrics.functions import precision as precision
from kaun.metrics.functions import recall as recall
from kaun.metrics.sums import AHEAD as AHEAD
from kaun.metrics.sums import DelayedReader as DelayedReader
from kaun.metrics.sums import ExactMean as ExactMean
from kaun.metrics.sums import is_real_scalar as is_real_scalar
from kaun.metrics.tracker import Tracker as Tracker
from kaun.metrics.tracker import evaluate as evaluate
from kaun.metrics.tracker import evaluate_many as evaluate_many

# What users reach; the rest is for kaun.evaluation.
__all__ = [
    "Counted", "Tracker", "accuracy", "binary_accuracy", "evaluate", "evaluate_many", "f1", "precision", "recall",
]  # fmt: skip
