"""What several measurements share: machine, pair, FLOPs, statistics, results and their tables, commands."""
