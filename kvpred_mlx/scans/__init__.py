"""On MLX's CPU backend: scans of recurrent layers in blocks of tokens, depthwise convolutions as shifted products.

There mlx-lm's own take a step for each token, and half of a prefill.  What is here stands in their place in mlx-lm, for
whoever calls it (`_registration` imports it after mlx-lm's modules), and decides at each call (`when`): elsewhere, for
a few tokens, or with `KVPRED_MLX_NO_SCANS` set, mlx-lm's own are called.
"""
