"""Recipes that work without tuning: one a file, each exporting RECIPE."""
