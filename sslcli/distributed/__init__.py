"""Collectives, device selection, process launch and the watchdog for stalled ranks.

Users who write their own methods import the collectives from here.
"""

from sslcli.distributed.batch_shuffle import BatchShuffle as BatchShuffle
from sslcli.distributed.collectives import all_gather as all_gather
from sslcli.distributed.collectives import all_gather_with_grad as all_gather_with_grad
from sslcli.distributed.collectives import all_reduce_mean as all_reduce_mean
from sslcli.distributed.collectives import barrier as barrier
from sslcli.distributed.collectives import broadcast_objects as broadcast_objects
from sslcli.distributed.collectives import exchange as exchange
from sslcli.distributed.collectives import gather_objects as gather_objects
from sslcli.distributed.collectives import is_main as is_main
from sslcli.distributed.collectives import local as local
from sslcli.distributed.collectives import rank as rank
from sslcli.distributed.collectives import whole as whole
from sslcli.distributed.collectives import world_size as world_size
