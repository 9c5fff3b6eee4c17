"""Grids of configurations: measured, stored, drawn, chosen from."""
