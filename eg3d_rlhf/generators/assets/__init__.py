"""Assets under optimisation, how they are seen, and where cameras stand."""
