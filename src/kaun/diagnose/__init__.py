"""Questions about a training run: why a step is not finite, and which learning rate to take."""

from kaun.diagnose.explain import Explanation as Explanation
from kaun.diagnose.explain import explain as explain
from kaun.diagnose.lr_range import RateRange as RateRange
from kaun.diagnose.lr_range import lr_range as lr_range
