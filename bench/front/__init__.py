"""`kvpred-mlx pareto`: quality of every method at every budget against FLOPs and TTFT."""
