"""How a trained model is evaluated: passes over data for ``evaluate`` and ``predict``, and ``export``.

Read ``passes`` first. ``totals`` adds the metrics up, and ``rows`` gives them the mask and weights of padded batches.
"""

from kaun.evaluation.export import export_model as export_model
from kaun.evaluation.passes import evaluate as evaluate
from kaun.evaluation.passes import evaluate_members as evaluate_members
from kaun.evaluation.passes import predict as predict
from kaun.evaluation.passes import predict_members as predict_members
from kaun.evaluation.totals import check_metrics as check_metrics
from kaun.evaluation.trace import trace_metrics as trace_metrics
