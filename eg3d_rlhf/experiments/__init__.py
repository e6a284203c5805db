"""Tools for long jobs: run folders with locks and checkpoints, worker processes, report pages and images."""
