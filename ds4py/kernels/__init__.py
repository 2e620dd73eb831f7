"""One operation per name, written once against `ops.Ops`: MLX arrays, or numpy's on a CPU.

Knows arrays, nothing of checkpoints. Nothing here evaluates a lazy array.
"""
