"""Reports: what ``fit`` calls after its steps."""

from kaun.reports.core import all_of as all_of
from kaun.reports.core import each_epoch as each_epoch
from kaun.reports.core import every as every
from kaun.reports.files import csv as csv
from kaun.reports.files import jsonl as jsonl
from kaun.reports.history import History as History
from kaun.reports.history import history as history
from kaun.reports.plot import plot as plot
from kaun.reports.progress import progress as progress
from kaun.reports.rate import learning_rate as learning_rate
from kaun.reports.stopping import EarlyStopping as EarlyStopping
from kaun.reports.stopping import early_stopping as early_stopping
from kaun.reports.stopping import time_limit as time_limit
from kaun.reports.tensorboard import tensorboard as tensorboard
from kaun.reports.trackers import mlflow as mlflow
from kaun.reports.trackers import wandb as wandb
from kaun.reports.validate import Validation as Validation
from kaun.reports.validate import validate as validate
from kaun.train import Report as Report
