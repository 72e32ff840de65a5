"""Recipes for TPU slices."""
