"""Photographs, and DCT spectra of images."""
