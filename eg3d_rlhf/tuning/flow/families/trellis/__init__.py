"""TRELLIS in plain PyTorch: both flows, their autoencoders, its files, and the pipeline that they make."""
