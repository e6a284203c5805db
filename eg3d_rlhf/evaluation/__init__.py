"""Evaluation of generators: each module makes parts of a report from one `Comparison` of networks."""
