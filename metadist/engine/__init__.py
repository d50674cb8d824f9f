"""Compute the meta-gradient of a shard: unrolled, mixed, compiled; predict its memory."""
