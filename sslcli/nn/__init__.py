"""Building blocks of methods: heads, EMA, BatchNorm variants, decoder, random numbers, losses, schedules.

Methods in other packages may import every name of this module.
"""

from sslcli.nn.batch_norm import SplitBatchNorm as SplitBatchNorm
from sslcli.nn.batch_norm import SyncBatchNorm as SyncBatchNorm
from sslcli.nn.batch_norm import average_statistics as average_statistics
from sslcli.nn.batch_norm import convert_batch_norm as convert_batch_norm
from sslcli.nn.ema import ema_update as ema_update
from sslcli.nn.ema import frozen_copy as frozen_copy
from sslcli.nn.heads import mlp as mlp
from sslcli.nn.modes import evaluating as evaluating
from sslcli.nn.modes import full_precision as full_precision
from sslcli.nn.modes import unchanged_statistics as unchanged_statistics
