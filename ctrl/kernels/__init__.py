"""Flat loops compiled by Numba: random words and normals, mixture scores, the chain itself.

Blocks of `LANES` paths are the unit of work: the time loop is outside, the loop over lanes innermost, everything that a
block touches stays in the first-level cache, and the last block is padded, so that no number depends on chunking, on
threads or on where a block begins. Lower files are compiled into the kernels that call them, and Numba's cache watches
only the calling file: after editing normals.py or mixture.py, touch chain.py.
"""
