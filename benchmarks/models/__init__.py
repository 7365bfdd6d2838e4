"""Whole models: training and sampling steps, swapped decoders, the compiled trunk, data loading."""
