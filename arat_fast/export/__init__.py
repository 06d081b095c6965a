"""Trained networks written for other software."""
