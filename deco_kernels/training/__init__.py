"""Training: configuration, images, data loading, checkpoints and the loop that `python/train.py` runs.

Needs the packages of the extra "train" (`pip install deco_kernels[train]`); nothing else in deco_kernels imports this.
"""
