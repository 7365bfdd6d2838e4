"""Training: configuration, images, data loading, checkpoints and the loop of `python/train.py`.

Needs the extra "train" (`pip install deco_kernels[train]`). No other package of deco_kernels imports this one.
"""
