"""Several processes: joining those that torchrun started, and leaving them."""

from hetu.runtime.distributed import gather_shards, init_distributed, shutdown_distributed, use_hardware

__all__ = ["gather_shards", "init_distributed", "shutdown_distributed", "use_hardware"]
