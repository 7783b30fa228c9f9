"""Data-parallel ranks, training backends (DDP, FSDP2, DeepSpeed) and sharded state."""
