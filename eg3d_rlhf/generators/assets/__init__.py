"""Assets under optimisation, their renderings, and the cameras."""
