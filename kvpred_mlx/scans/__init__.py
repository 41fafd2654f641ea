"""On MLX's CPU backend: scans in blocks of tokens, depthwise convolutions by shifts, quantized weights unpacked.

There MLX's and mlx-lm's own take a step for each token: half of a prefill, or nearly all.  What is here stands in their
place, for whoever calls it (`_registration` imports it after mlx-lm's modules), and decides at each call (`when`):
elsewhere, for a few tokens, or with `KVPRED_MLX_NO_SCANS` set, their own are called.
"""
