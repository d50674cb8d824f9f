"""Compute the meta-gradient of a shard: unrolled, mixed, compiled; and predict its memory."""
