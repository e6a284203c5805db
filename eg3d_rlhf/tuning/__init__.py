"""The three ways to tune: gan/, flow/, distill/."""
