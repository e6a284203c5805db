"""One run of a long job: its folder, lock, recorded settings and inputs, lines, states and signals."""
