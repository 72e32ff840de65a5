"""Recipes: one file a run, each stating its question and what it costs."""
