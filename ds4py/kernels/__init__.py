"""One operation per name, with its reference in plain MLX. Knows arrays, nothing of checkpoints.

Nothing here evaluates, with one exception: `dense.BlasDense` hands matrix products to the host's
BLAS, because MLX's CPU back end reaches 3 GFLOP/s where the BLAS reaches 100.
"""
