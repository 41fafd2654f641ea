"""`python -m kvpred_mlx`."""

from kvpred_mlx.cli import main

main()
