"""The kernels of `pallas_kernels`, each on the named problems of its op, beside their peers in the same process.

How a call is timed is in `timing.py`, what is measured of a case in `measure.py`; `ops/` has a file for each op.
"""
