"""The stages: one file each, what it builds and a step that reads like the maths."""
