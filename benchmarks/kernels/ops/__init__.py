"""The ops that are measured, by name."""

from benchmarks.kernels.ops import flash_attention, flash_decoding, streaming_matmul, streaming_mlp, tiled_matmul

OPS = {
    op.name: op
    for op in (flash_attention.OP, flash_decoding.OP, streaming_matmul.OP, streaming_mlp.OP, tiled_matmul.OP)
}
