"""How a step happens: plain or data-parallel torch, DeepSpeed ZeRO."""
