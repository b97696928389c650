"""Training: what inference needs of it. First the demo model that the package carries."""
