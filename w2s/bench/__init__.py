"""What this machine can do: `w2s doctor` looks at it, `w2s bench` measures it beside a peer.

Read `report.py` first: a stage's step, measured by `step.py`. `loss.py` measures a loss, `loaders/` reading.
"""
