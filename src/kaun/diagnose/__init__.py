"""Questions about a run: why a step is not finite (``explain``), and which learning rate to use (``lr_range``)."""

from kaun.diagnose.explain import Explanation as Explanation
from kaun.diagnose.explain import explain as explain
from kaun.diagnose.lr_range import RateRange as RateRange
from kaun.diagnose.lr_range import lr_range as lr_range
from kaun.diagnose.summary import summary as summary
