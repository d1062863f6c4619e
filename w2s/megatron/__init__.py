"""The only place that imports `megatron` or `transformer_engine`."""
