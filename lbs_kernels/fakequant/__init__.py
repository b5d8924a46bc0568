"""The element-wise quantizers of training: one pass over memory each way (on the CPU: csrc/fakequant)."""
