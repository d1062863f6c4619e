"""The towers: model code that builds a chunk of a layout, and knows no process groups.

A constructor takes the layout (`ParallelConfig`). `first` and `last` of `w2s.megatron.model.tower.Tower` say whether a
chunk embeds the input and whether it makes the output; what travels between chunks and ranks is `w2s/megatron`'s
business.
"""
