"""What train.py and eg3d-rlhf run: one file a mode, its flags and whole default run in view."""
