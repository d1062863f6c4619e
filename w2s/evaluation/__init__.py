"""What is measured on test images: of a tower (`evaluator.py`, first), a CLIP, a masked student.

`scores/` has the measures themselves.
"""
