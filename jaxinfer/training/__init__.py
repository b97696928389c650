"""Training: what inference needs of it. The demo model that the package carries, and draft models."""
