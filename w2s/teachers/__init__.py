"""Frozen teachers: images in, patch features on the student's grid out."""
