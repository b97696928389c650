"""Measurements. Each module is a command, `python -m benchmarks.NAME`, that writes `results/<gpu>/NAME.json`."""
