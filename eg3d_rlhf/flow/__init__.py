"""Flow-based generators in stages, and preference training of any stage (Circular-DPO)."""
