"""Metrics of predictions against targets, and their exact values over batches."""

from typing import TYPE_CHECKING

from kaun._calls import module_names as _module_names
from kaun.metrics.classification import accuracy as accuracy
from kaun.metrics.classification import binary_accuracy as binary_accuracy
from kaun.metrics.classification import confusion_matrix as confusion_matrix
from kaun.metrics.classification import f1 as f1
from kaun.metrics.classification import mean_iou as mean_iou
from kaun.metrics.classification import precision as precision
from kaun.metrics.classification import recall as recall
from kaun.metrics.classification import top_k_accuracy as top_k_accuracy
from kaun.metrics.counted import Counted as Counted
from kaun.metrics.counted import CountedParts as CountedParts
from kaun.metrics.counted import gives_array as gives_array
from kaun.metrics.counted import result_of as result_of
from kaun.metrics.counted import result_or_nan as result_or_nan
from kaun.metrics.ranking import auc as auc
from kaun.metrics.ranking import average_precision as average_precision
from kaun.metrics.regression import mean_absolute_error as mean_absolute_error
from kaun.metrics.regression import perplexity as perplexity
from kaun.metrics.regression import r2 as r2
from kaun.metrics.regression import rmse as rmse
from kaun.metrics.sums import BatchMean as BatchMean
from kaun.metrics.sums import Counts as Counts
from kaun.metrics.sums import CountSums as CountSums
from kaun.metrics.sums import ExactMean as ExactMean
from kaun.metrics.sums import MetricSums as MetricSums
from kaun.metrics.sums import Part as Part
from kaun.metrics.sums import Ratio as Ratio
from kaun.metrics.sums import run_ahead as run_ahead
from kaun.metrics.tracker import Tracker as Tracker
from kaun.metrics.tracker import evaluate as evaluate
from kaun.metrics.tracker import evaluate_many as evaluate_many

# What users reach; the rest is for other packages of kaun.
__all__ = [
    "Counted", "Tracker", "accuracy", "auc", "average_precision", "binary_accuracy", "confusion_matrix", "evaluate",
    "evaluate_many", "f1", "mean_absolute_error", "mean_iou", "perplexity", "precision", "r2", "recall", "rmse",
    "top_k_accuracy",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # the type checker knows the names, and must not accept any other
    __getattr__ = _module_names(__name__)
