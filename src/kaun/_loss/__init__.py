"""How a loss is compiled once.

A loss is a fresh closure for each batch. It is taken apart into a static key and the arrays that it captures
(``capture``), and made again from the key around traced arrays (``rebuild``) while the step is traced (``trace``).
"""

from kaun._loss.capture import FrozenLoss as FrozenLoss
from kaun._loss.capture import Loss as Loss
from kaun._loss.capture import capture_loss as capture_loss
from kaun._loss.capture import snapshot_loss as snapshot_loss
from kaun._loss.code import attributes_of as attributes_of
from kaun._loss.code import code_info as code_info
from kaun._loss.code import methods_of as methods_of
from kaun._loss.code import reads_by_name as reads_by_name
from kaun._loss.describe import captures as captures
from kaun._loss.describe import subject as subject
from kaun._loss.origin import is_library as is_library
from kaun._loss.rebuild import parts as parts
from kaun._loss.rebuild import rebuild_loss as rebuild_loss
from kaun._loss.trace import trace_function as trace_function
from kaun._loss.trace import trace_loss as trace_loss
from kaun._loss.walk import LossKey as LossKey
