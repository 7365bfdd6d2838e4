"""Parts of sample.py, spectrum.py and app.py."""
