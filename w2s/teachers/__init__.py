"""Frozen teachers: images in, patch features on the student's grid and a summary out."""
