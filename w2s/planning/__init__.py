"""Which layouts of a stage fit on a number of GPUs, and how fast they are: FLOPs, memory and time without a GPU."""
