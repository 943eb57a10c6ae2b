"""A recipe under FSDP2 on a CPU, which accelerate would quietly run as DDP: python tests/fsdp_on_cpu.py RECIPE --flags ..."""

import runpy
import sys

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

plain = Accelerator.__init__


def sharded(self, **options):
    plain(self, **options)
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    self.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


Accelerator.__init__ = sharded
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
