"""What sample.py, spectrum.py and app.py are made of."""
