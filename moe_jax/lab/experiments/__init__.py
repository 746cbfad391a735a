"""Experiments declared as files: recipes, seeds and expectations in JSON, tables out."""
