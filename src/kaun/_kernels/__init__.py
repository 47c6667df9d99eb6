"""Operations laid out so that XLA:CPU runs them on its fast kernels; on other devices they are JAX's own."""

from kaun._kernels.columns import columns_lost as columns_lost
from kaun._kernels.conv import ConvConfig as ConvConfig
from kaun._kernels.conv import convolve as convolve
from kaun._kernels.conv import convolve_transposed as convolve_transposed
from kaun._kernels.matmul import matmul as matmul
from kaun._kernels.memory import aligned_empty as aligned_empty
from kaun._kernels.memory import trim_heap as trim_heap
from kaun._kernels.norm import normalize as normalize
from kaun._kernels.pool import larger as larger
from kaun._kernels.pool import largest_in_windows as largest_in_windows
from kaun._kernels.pool import taps as taps
from kaun._kernels.pool import windows as windows
from kaun._kernels.products import with_summed_products as with_summed_products
from kaun._kernels.random_bits import bits_for as bits_for
from kaun._kernels.random_bits import random_bits as random_bits
from kaun._kernels.recompute import recomputed as recomputed
from kaun._kernels.recurrent import GRU as GRU
from kaun._kernels.recurrent import LSTM as LSTM
from kaun._kernels.recurrent import RNN as RNN
from kaun._kernels.recurrent import Cell as Cell
from kaun._kernels.recurrent import recurrence as recurrence
