"""The loop and where its shards run. Ray is imported by the ``ray_…`` modules alone, when it is used."""
