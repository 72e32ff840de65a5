"""Tiny policies, scripted agents and a small corpus for tests."""
