"""Adaptation as a service: load a trained model, then adapt and predict over gRPC, HTTP or Ray Serve."""

import metadist.rpc  # noqa: F401  (sets gRPC's environment variables before grpc is imported)
