"""Which layouts of a stage fit on a number of GPUs, and how fast they are: FLOPs, memory and time without a GPU.

Read `plan.py` first, the search; a layout's bytes are in `memory/`, its seconds in `time/`, and the sizes and FLOPs
that both are worked out of in `model/`.
"""
