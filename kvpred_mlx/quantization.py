"""What MLX can quantize to."""

WEIGHT_BITS = (2, 3, 4, 5, 6, 8)
KV_BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)
