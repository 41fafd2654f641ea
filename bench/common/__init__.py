"""What several measurements share: machine, statistics, FLOPs, results on disk."""
