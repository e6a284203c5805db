"""Speed of the project against straightforward EG3D, in one process: `python -m benchmarks --help`."""
