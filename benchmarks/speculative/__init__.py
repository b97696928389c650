"""What speculation costs, and what it brings."""
