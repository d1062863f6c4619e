"""Process groups, sharded towers, pipeline passes and the distributed optimizer."""
