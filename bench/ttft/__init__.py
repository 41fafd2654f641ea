"""`kvpred-mlx bench`: how much sooner the first token comes."""
