"""Networks of TRELLIS: its flows, its autoencoders and their building blocks."""
