"""A cluster job rehearsed on one CPU: some of its ranks take real steps, without numbers and without the others.

Read `rehearsal.py` first, then `rank.py`: one rank, whose GPU, groups and kernels are `stand_ins/`, and what it does is
noted on a `tape.py`. `agreement.py` and `timeline.py` look at the tapes of all ranks together.
"""
