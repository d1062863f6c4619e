"""What a stage consists of: sizes and FLOPs of towers and teachers, and the order in which a pipeline runs them."""
