"""Measurement: contenders, verification, timing, machine ceilings and result files."""
